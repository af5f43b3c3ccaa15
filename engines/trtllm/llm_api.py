"""A TensorRT-LLM engine through the LLM API of the engine backend, with the same steps as ModelRunnerCpp gives.

Read in TensorRT-LLM's llmapi/llm_args.py and examples/llm-api/llm_medusa_decoding.py, not run: a built engine brings its own build
configuration, and MedusaDecodingConfig becomes the executor's decoding mode and medusa_choices.
"""

from __future__ import annotations

import importlib
import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.engines.trtllm.session import TIMEOUT, NoAnswerError, StepTokens, as_list, drafts
from medusa_export.heads.contract.trtllm_releases import release_of_engine

FIRST = (0, 20)  # the oldest release in whose sources a tree was seen to reach an engine that is built already
OWN_MODULE = (1, 0)  # from here on the plain LLM is PyTorch's, which has no Medusa


def require_llm_api(version: object, where: str) -> None:
    """Raise ConfigError unless the LLM API of the release that built an engine takes a tree for it."""
    release = release_of_engine(version, where)
    if release.numbers[:2] < FIRST:
        got = f"TensorRT-LLM {release.name}, whose LLM API is not known to take a tree for a built engine"
        raise ConfigError(
            "--trtllm-api llm", got, "0.20 to 1.2.1", "leave it out: ModelRunnerCpp takes the tree in all releases"
        )


class LlmApiSession:
    """See :class:`~medusa_export.engines.trtllm.session.Session`."""

    def __init__(
        self,
        engine_dir: Path,
        medusa_choices: list[list[int]] | None,
        max_tokens: int,
        *,
        timeout: float = TIMEOUT,
        windows: int | list[int] | None = None,
    ) -> None:
        config = json.loads((engine_dir / "config.json").read_text(encoding="utf-8"))
        release = release_of_engine(config.get("version"), str(engine_dir / "config.json"))
        api = importlib.import_module("tensorrt_llm.llmapi")
        engine_backend = "tensorrt_llm._tensorrt_engine" if release.numbers[:2] >= OWN_MODULE else "tensorrt_llm"
        limits = {"max_attention_window": as_list(windows)} if windows else {}
        options: dict[str, Any] = {"kv_cache_config": api.KvCacheConfig(max_tokens=max_tokens, **limits)}
        if medusa_choices is not None:
            pretrained = config["pretrained_config"]
            options["speculative_config"] = api.MedusaDecodingConfig(
                max_draft_len=pretrained["max_draft_len"], num_medusa_heads=pretrained["num_medusa_heads"],
                medusa_choices=medusa_choices,
            )  # fmt: skip
        self._api, self._timeout = api, timeout
        self._llm = importlib.import_module(engine_backend).LLM(
            model=str(engine_dir), skip_tokenizer_init=True, gather_generation_logits=True, **options
        )

    def stream(
        self, input_ids: Sequence[int], max_new_tokens: int, end_ids: Sequence[int] = ()
    ) -> Iterator[StepTokens]:
        """As :meth:`~medusa_export.engines.trtllm.session.Session.stream`."""
        sampling = self._sampling(max_new_tokens, end_ids, return_perf_metrics=True)
        seen, start = 0, time.perf_counter()
        for part in self._parts(input_ids, sampling, streaming=True):
            tokens = part.tokens[seen:]
            seen = len(part.tokens)
            if part.finish_reason == "stop" and end_ids and (not tokens or tokens[-1] not in end_ids):
                tokens.append(end_ids[0])
            yield StepTokens(tokens, part.at - start, part.finish_reason, part.drafts)

    def generation_logits(self, input_ids: Sequence[int], new_tokens: int) -> tuple[list[int], Any]:
        """The tokens that follow, and the logits that each was chosen by.  # [T], float32 [T, vocab_size]"""
        sampling = self._sampling(new_tokens, (), return_generation_logits=True)
        *_, part = self._parts(input_ids, sampling, streaming=False)
        return part.tokens, part.logits.float().cpu().numpy()[: len(part.tokens)]

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._llm.shutdown()

    def _sampling(self, max_tokens: int, end_ids: Sequence[int], **options: bool) -> Any:
        return self._api.SamplingParams(
            max_tokens=max_tokens, top_k=1, end_id=end_ids[0] if end_ids else -1, pad_id=end_ids[0] if end_ids else 0,
            stop_token_ids=list(end_ids[1:]) or None, include_stop_str_in_output=True, detokenize=False, **options,
        )  # fmt: skip

    def _parts(self, input_ids: Sequence[int], sampling: Any, *, streaming: bool) -> Iterator[_Part]:
        """The answer so far, whenever there is more of it.

        Raises:
            NoAnswerError: nothing within the time; the request is aborted.
        """
        request = self._llm.generate_async(list(input_ids), sampling, streaming=streaming)
        found: queue.SimpleQueue[_Part | BaseException] = queue.SimpleQueue()
        threading.Thread(target=_collect, args=(request, found, streaming), daemon=True).start()
        while True:
            try:
                part = found.get(timeout=self._timeout)
            except queue.Empty:
                request.abort()
                raise NoAnswerError(f"no answer within {self._timeout:g} seconds") from None
            if isinstance(part, BaseException):
                raise part
            yield part
            if part.finish_reason:
                return


@dataclass(frozen=True)
class _Part:
    """What a result said when it came: the API gives the same object again and again, and fills it on.

    Attributes:
        at: time.perf_counter() then.
        finish_reason: "" while there is more to come.
    """

    tokens: list[int]
    at: float
    finish_reason: str
    drafts: tuple[int, int] | None
    logits: Any


def _collect(request: Any, found: queue.SimpleQueue[_Part | BaseException], streaming: bool) -> None:
    """Waits for results, which the API cannot do for a limited time."""
    try:
        for result in request if streaming else [request.result()]:
            output = result.outputs[0]
            reason = (output.finish_reason or "length") if result.finished else ""
            counted = drafts(getattr(output, "request_perf_metrics", None))
            tokens = [int(token) for token in output.token_ids]
            found.put(_Part(tokens, time.perf_counter(), reason, counted, output.generation_logits))
    except BaseException as error:  # raised again where the parts are read
        found.put(error)
