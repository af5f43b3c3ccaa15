"""TensorRT-LLM behind the runner: whole answers from its own runtime, with the tokens of every step counted.

Two engines of the same weights: one built for Medusa and one without. Whether a difference between them is a tie is judged on the
logits of the one without, see :meth:`TrtllmEngine.score`. Nothing of this ran on a GPU: see docs/tensorrt-llm.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError, MedusaExportError, missing_package
from medusa_export.core.json_fields import read_json
from medusa_export.engines.decoding.protocols import Generation
from medusa_export.engines.trtllm.command import BASELINE, MEDUSA
from medusa_export.engines.trtllm.llm_api import LlmApiSession, require_llm_api
from medusa_export.engines.trtllm.session import TIMEOUT, NoAnswerError, Session
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.contract.trtllm_releases import release_of_engine
from medusa_export.heads.trees.tree import Tree

BACKEND = "tensorrt-llm"
Choices = tuple[tuple[int, ...], ...]
AnySession: TypeAlias = Session | LlmApiSession
SESSIONS: dict[str, type[Session] | type[LlmApiSession]] = {"runner": Session, "llm": LlmApiSession}


class RunError(MedusaExportError):
    """TensorRT-LLM gave no answer."""


class TrtllmEngine:
    """Batch 1, greedy. See :class:`medusa_export.engines.decoding.protocols.WholeEngine`.

    Args:
        engine_dir: directory with engine.json, and in ``medusa`` and ``baseline`` what trtllm-build wrote.
        api: "runner" for ModelRunnerCpp, "llm" for the LLM API.
        timeout: seconds to wait for a step, or for an answer that does not come in steps.

    Raises:
        ConfigError: no built engine, one of a release without Medusa, or whose LLM API takes no tree.
        MissingPackageError: no tensorrt_llm.
    """

    def __init__(self, engine_dir: Path, *, api: str = "runner", timeout: float = TIMEOUT) -> None:
        if api not in SESSIONS:
            raise ConfigError("--trtllm-api", repr(api), f"one of {', '.join(SESSIONS)}", "correct it")
        self._open, self._timeout = SESSIONS[api], timeout
        self.info = EngineInfo.load(engine_dir)
        self._dir = engine_dir
        for name in (MEDUSA, BASELINE):
            config = engine_dir / name / "config.json"
            if not config.is_file():
                raise ConfigError(
                    str(config.parent), "nothing", "a built engine", "run build.sh of the export where the GPU is"
                )
            version = read_json(config).get("version")
            release_of_engine(version, str(config))
            if api == "llm":
                require_llm_api(version, str(config))
        built = read_json(engine_dir / MEDUSA / "config.json")["pretrained_config"]
        self.max_draft_len = int(built["max_draft_len"])
        self.num_gpus = int(built["mapping"]["tp_size"])
        self._sessions: dict[str, tuple[Choices, AnySession]] = {}

    def decode(
        self, input_ids: Sequence[int], tree: Tree, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generation:
        """One answer. The tree goes to the runtime when the engine is opened; another one opens it anew.

        Args:
            input_ids: the prompt.
            tree: what steps verify; an empty one decodes plainly.
            max_new_tokens: most tokens of the answer.
            eos_token_ids: any of them ends it.

        Raises:
            TreeError, ConfigError: a tree that the engine was not built for.
            RunError: the runtime refuses the request, or says nothing within the time.
        """
        result, session = Generation(), self._session(tree)
        with _one_line():
            for step in session.stream(input_ids, max_new_tokens, tuple(eos_token_ids)):
                if result.tokens:
                    result.accepted.append(len(step.tokens))
                    result.decode_ms = step.seconds * 1e3 - result.prefill_ms
                else:
                    result.prefill_ms = step.seconds * 1e3
                result.tokens += step.tokens
                result.finish_reason = step.finish_reason or result.finish_reason
                result.counted_drafts = step.drafts or result.counted_drafts
        result.keep(max_new_tokens)  # a step may go past the limit
        result.backend_ms = result.decode_ms  # all of it is the runtime's
        return result

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        """Next-token logits of a given text from ``start`` on, by the engine without Medusa.

        The runtime cannot be fed token by token. With ``chunk`` 1 the logits are those of its own decoding steps as long as these
        follow the text; otherwise, and where they do not, those of a prefill of everything before.

        Args:
            input_ids: the text.
            chunk: 1: by decoding steps; otherwise by prefills.
            start: first token whose next-token logits are wanted.

        Yields:
            logits of consecutive tokens.  # [1, vocab_size]
        """
        session, text = self._session(Tree(())), list(input_ids)
        steps: list[npt.NDArray[np.float32]] = []
        if chunk == 1 and start:
            tokens, logits = _logits(session, text[:start], len(text) - start + 1)
            follows = [ours == theirs for ours, theirs in zip(tokens, text[start:], strict=False)]
            steps = list(logits[1 : [*follows, False].index(False) + 1])
        for at in range(start, len(text)):
            own = steps[at - start] if at - start < len(steps) else _logits(session, text[: at + 1], 1)[1][0]
            yield own[None]

    def close(self) -> None:
        """Give the GPU's memory back."""
        for _, session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def _session(self, tree: Tree) -> AnySession:
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
            session = self._open(
                self._dir / name,
                choices,
                2 * self.info.max_length,
                timeout=self._timeout,
                windows=self.info.source.get("sliding_window"),
            )
        except ImportError as error:
            raise missing_package("tensorrt_llm", "tensorrt-llm") from error
        self._sessions[name] = (tree.choices, session)
        return session


def _logits(session: AnySession, input_ids: list[int], new_tokens: int) -> tuple[list[int], Any]:
    with _one_line():
        return session.generation_logits(input_ids, new_tokens)


@contextmanager
def _one_line() -> Iterator[None]:
    """What the runtime says of a request that it does not answer, as an error that a command prints in one line."""
    try:
        yield
    except NoAnswerError as error:
        raise RunError("TensorRT-LLM", str(error), "an answer", "see its log, or raise --timeout") from error
    except RuntimeError as error:
        raise RunError("TensorRT-LLM", str(error), "an answer", "correct the request, or see its log") from error
