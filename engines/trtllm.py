"""TensorRT-LLM behind the runner: whole answers from its own runtime, with the tokens of every step counted.

Two engines of the same weights: one built for Medusa and one without. Whether a difference between them is a tie is judged on the
logits of the one without, see :meth:`TrtllmEngine.score`. Nothing of this ran on a GPU: see docs/tensorrt-llm.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medusa_export.engines.base import Generation
from medusa_export.engines.trtllm_command import BASELINE, MEDUSA
from medusa_export.engines.trtllm_session import Session
from medusa_export.heads.config import read_json
from medusa_export.heads.engine_info import EngineInfo
from medusa_export.heads.errors import ConfigError, missing_package
from medusa_export.heads.tree import Tree
from medusa_export.heads.trtllm_releases import release_of_engine

BACKEND = "tensorrt-llm"
Choices = tuple[tuple[int, ...], ...]


class TrtllmEngine:
    """Batch 1, greedy. See :class:`medusa_export.engines.base.WholeEngine`.

    Args:
        engine_dir: directory with engine.json, and in ``medusa`` and ``baseline`` what trtllm-build wrote.

    Raises:
        ConfigError: no built engine, or one of a release without Medusa.
        MissingPackageError: no tensorrt_llm.
    """

    def __init__(self, engine_dir: Path) -> None:
        self.info = EngineInfo.load(engine_dir)
        self._dir = engine_dir
        for name in (MEDUSA, BASELINE):
            config = engine_dir / name / "config.json"
            if not config.is_file():
                raise ConfigError(
                    str(config.parent), "nothing", "a built engine", "run build.sh of the export where the GPU is"
                )
            release_of_engine(read_json(config).get("version"), str(config))
        built = read_json(engine_dir / MEDUSA / "config.json")["pretrained_config"]
        self.max_draft_len = int(built["max_draft_len"])
        self.num_gpus = int(built["mapping"]["tp_size"])
        self._sessions: dict[str, tuple[Choices, Session]] = {}

    def decode(
        self, input_ids: Sequence[int], tree: Tree, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generation:
        """One answer. The tree goes to the runtime when the engine is opened; another one opens it anew.

        Raises:
            TreeError, ConfigError: a tree that the engine was not built for.
        """
        result = Generation()
        for step in self._session(tree).stream(input_ids, max_new_tokens, tuple(eos_token_ids)):
            if result.tokens:
                result.accepted.append(len(step.tokens))
                result.decode_ms = step.seconds * 1e3 - result.prefill_ms
            else:
                result.prefill_ms = step.seconds * 1e3
            result.tokens += step.tokens
            result.finish_reason = step.finish_reason or result.finish_reason
        del result.tokens[max_new_tokens:]  # a step may go past the limit
        result.backend_ms = result.decode_ms  # all of it is the runtime's
        return result

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        """Next-token logits of a given text from ``start`` on, by the engine without Medusa.

        The runtime cannot be fed token by token. With ``chunk`` 1 the logits are those of its own decoding steps as long as these
        follow the text; otherwise, and where they do not, those of a prefill of everything before.

        Yields:
            logits of consecutive tokens.  # [1, vocab_size]
        """
        session, text = self._session(Tree(())), list(input_ids)
        steps: list[npt.NDArray[np.float32]] = []
        if chunk == 1 and start:
            tokens, logits = session.generation_logits(text[:start], len(text) - start + 1)
            follows = [ours == theirs for ours, theirs in zip(tokens, text[start:], strict=False)]
            steps = list(logits[1 : [*follows, False].index(False) + 1])
        for at in range(start, len(text)):
            own = steps[at - start] if at - start < len(steps) else session.generation_logits(text[: at + 1], 1)[1][0]
            yield own[None]

    def close(self) -> None:
        """Give the GPU's memory back."""
        for _, session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def _session(self, tree: Tree) -> Session:
        name = MEDUSA if tree.max_draft_len else BASELINE
        opened = self._sessions.get(name)
        if opened and opened[0] == tree.choices:
            return opened[1]
        if tree.max_draft_len > self.max_draft_len:
            raise ConfigError(
                "tree",
                f"{tree.max_draft_len} nodes",
                f"at most {self.max_draft_len}, what the engine was built for",
                "export anew",
            )
        self.info.require_tree(tree)
        if opened:
            opened[1].close()
        choices = [list(choice) for choice in tree.choices] or None
        try:
            session = Session(self._dir / name, choices, 2 * self.info.max_length)
        except ImportError as error:
            raise missing_package("tensorrt_llm", "tensorrt") from error
        self._sessions[name] = (tree.choices, session)
        return session
