"""A stand-in for the part of ``tensorrt_llm`` that the runner uses: ModelRunnerCpp and its executor, with their argument names.

It is no model: the next token is a fixed function of the last one and of the length, and a "Medusa" engine accepts a fixed number of
tokens a step. What it proves is that our side asks for the right things, and reads what comes back rightly.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

VOCAB = 32
END = 2


def next_token(text: list[int]) -> int:
    """What every engine of the stand-in says after a text; a text of 60 tokens ends it."""
    return END if len(text) == 60 else 3 + (text[-1] * 7 + len(text)) % 29


class FinishReason(Enum):
    NOT_FINISHED, END_ID, STOP_WORDS, LENGTH = range(4)


@dataclass
class SamplingConfig:
    beam_width: int = 1
    top_k: int | None = None


@dataclass
class OutputConfig:
    exclude_input_from_output: bool = False
    return_generation_logits: bool = False
    return_perf_metrics: bool = False


@dataclass
class Request:
    input_token_ids: list[int]
    max_tokens: int
    streaming: bool = False
    sampling_config: SamplingConfig = field(default_factory=SamplingConfig)
    output_config: OutputConfig = field(default_factory=OutputConfig)
    end_id: int | None = None
    stop_words: list[list[int]] | None = None


@dataclass
class StandInExecutor:
    """Attributes: strays: at which generated token a "Medusa" engine answers something else; None: never. silent: it says nothing."""

    medusa_choices: list[list[int]] | None
    strays: int | None = None
    open: bool = True
    silent: bool = False
    requests: list[Request] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)

    def enqueue_request(self, request: Request) -> int:
        assert self.open
        assert request.output_config.exclude_input_from_output
        assert request.sampling_config == SamplingConfig(beam_width=1, top_k=1)
        self.requests.append(request)
        return len(self.requests) - 1

    def cancel_request(self, number: int) -> None:
        self.cancelled.append(number)

    def await_responses(self, number: int, timeout: timedelta | None = None) -> list[Any]:
        assert timeout is not None, "a runtime that hangs must not hang us"
        if self.silent:
            return []
        request = self.requests[number]
        if len(request.input_token_ids) > 100:
            return [
                SimpleNamespace(has_error=lambda: True, error_msg="prompt is longer than max_input_len", result=None)
            ]
        steps = self._steps(request)
        if not request.streaming:
            steps = [[token for step in steps for token in step]]
        results = [self.make_result(request, step, last=index == len(steps) - 1) for index, step in enumerate(steps)]
        counts = request.output_config.return_perf_metrics and self.medusa_choices
        for index, result in enumerate(results):
            accepted = sum(len(step) - 1 for step in steps[1 : index + 1])
            counted = SimpleNamespace(
                total_accepted_draft_tokens=accepted, total_draft_tokens=index * len(self.medusa_choices or ())
            )
            result.request_perf_metrics = SimpleNamespace(speculative_decoding=counted) if counts else None
        return [SimpleNamespace(has_error=lambda: False, result=result) for result in results]

    def shutdown(self) -> None:
        self.open = False

    def _steps(self, request: Request) -> list[list[int]]:
        text, ends = list(request.input_token_ids), {request.end_id, *(word[0] for word in request.stop_words or [])}
        answer: list[int] = []
        while len(answer) < request.max_tokens and not (answer and answer[-1] in ends):
            token = next_token(text)
            if self.medusa_choices and self.strays == len(answer):
                token = (token + 1) % VOCAB
            answer.append(token)
            text.append(token)
        depth = 1 + (len(self.medusa_choices[-1]) if self.medusa_choices else 0)
        return [answer[:1], *(answer[at : at + depth] for at in range(1, len(answer), depth))]

    def make_result(self, request: Request, tokens: list[int], *, last: bool) -> Any:
        reason = FinishReason.NOT_FINISHED
        if last:
            words = [word[0] for word in request.stop_words or []]
            ended = tokens and tokens[-1] == request.end_id
            stopped = tokens and tokens[-1] in words
            reason = FinishReason.END_ID if ended else FinishReason.STOP_WORDS if stopped else FinishReason.LENGTH
        logits = None
        if request.output_config.return_generation_logits:
            text, rows = list(request.input_token_ids), []
            for token in tokens:
                row = torch.zeros(VOCAB)
                row[next_token(text)], row[(next_token(text) + 1) % VOCAB] = 5.0, 4.875
                rows.append(row)
                text.append(token)
            logits = torch.stack(rows)[None].half()
        return SimpleNamespace(
            output_token_ids=[tokens], is_final=last, finish_reasons=[reason], generation_logits=logits
        )  # fmt: skip


@dataclass
class KvCacheConfig:
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None


@dataclass
class MedusaDecodingConfig:
    max_draft_len: int
    num_medusa_heads: int
    medusa_choices: list[list[int]]


@dataclass
class SamplingParams:
    max_tokens: int
    top_k: int
    end_id: int
    pad_id: int
    stop_token_ids: list[int] | None
    include_stop_str_in_output: bool
    detokenize: bool
    return_perf_metrics: bool = False
    return_generation_logits: bool = False


class RequestOutput:
    """As the LLM API has it: one object, which is filled on and given again whenever there is more."""

    def __init__(self, executor: StandInExecutor, request: Request) -> None:
        self.executor, self.request, self.finished, self.aborted = executor, request, False, threading.Event()
        self.outputs = [
            SimpleNamespace(token_ids=[], finish_reason=None, generation_logits=None, request_perf_metrics=None)
        ]

    def __iter__(self) -> Iterator[RequestOutput]:
        number = self.executor.enqueue_request(self.request)
        if self.executor.silent:
            self.aborted.wait()
            return
        for response in self.executor.await_responses(number, timedelta(seconds=1)):
            if response.has_error():
                raise RuntimeError(response.error_msg)
            output, result = self.outputs[0], response.result
            output.token_ids += result.output_token_ids[0]
            output.request_perf_metrics = result.request_perf_metrics
            if result.generation_logits is not None:
                output.generation_logits = result.generation_logits[0]
            self.finished = result.is_final
            output.finish_reason = {"END_ID": "stop", "STOP_WORDS": "stop", "LENGTH": "length"}.get(
                result.finish_reasons[0].name
            )
            yield self

    def result(self) -> RequestOutput:
        *_, last = iter(self)
        return last

    def abort(self) -> None:
        self.executor.cancelled.append(len(self.executor.requests) - 1)
        self.aborted.set()


@dataclass
class StandIn:
    """What was asked of it. Attributes: opened: (directory's name, arguments) of every from_dir or LLM; executors: what it gave."""

    opened: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    executors: list[StandInExecutor] = field(default_factory=list)
    strays: int | None = None


def _model_runner(seen: StandIn) -> type:
    """TensorRT-LLM's class of a session; what it opens is written down in ``seen``."""

    class ModelRunnerCpp:
        def __init__(self, executor: StandInExecutor) -> None:
            self.executor = executor

        @classmethod
        def from_dir(
            cls, engine_dir: str, *, rank: int = 0, medusa_choices: list[list[int]] | None = None,
            max_tokens_in_paged_kv_cache: int | None = None, is_orchestrator_mode: bool = False,
            device_ids: list[int] | None = None, gather_generation_logits: bool = False,
            max_attention_window_size: list[int] | None = None,
        ) -> ModelRunnerCpp:  # fmt: skip
            given = {key: value for key, value in locals().items() if key not in ("cls", "engine_dir")}
            config = json.loads((Path(engine_dir) / "config.json").read_text())
            mode = config["build_config"]["speculative_decoding_mode"]
            assert (mode == 4) == (medusa_choices is not None), "without choices TensorRT-LLM takes its own tree"
            seen.opened.append((Path(engine_dir).name, given))
            seen.executors.append(StandInExecutor(medusa_choices, seen.strays))
            return cls(seen.executors[-1])

    return ModelRunnerCpp


def _llm(seen: StandIn) -> type:
    """The class of the LLM API, in the same way."""

    class LLM:
        def __init__(
            self, *, model: str, skip_tokenizer_init: bool, gather_generation_logits: bool, kv_cache_config: KvCacheConfig,
            speculative_config: MedusaDecodingConfig | None = None,
        ) -> None:  # fmt: skip
            config = json.loads((Path(model) / "config.json").read_text())
            mode = config["build_config"]["speculative_decoding_mode"]
            assert (mode == 4) == (speculative_config is not None)
            seen.opened.append(
                (Path(model).name, {"kv_cache_config": kv_cache_config, "speculative_config": speculative_config})
            )
            choices = speculative_config.medusa_choices if speculative_config else None
            seen.executors.append(StandInExecutor(choices, seen.strays))
            self._executor = seen.executors[-1]

        def generate_async(self, ids: list[int], params: SamplingParams, *, streaming: bool) -> RequestOutput:
            output = OutputConfig(True, params.return_generation_logits, params.return_perf_metrics)
            words = [[token] for token in params.stop_token_ids or ()]
            sampling = SamplingConfig(beam_width=1, top_k=params.top_k)
            return RequestOutput(
                self._executor, Request(ids, params.max_tokens, streaming, sampling, output, params.end_id, words)
            )

        def shutdown(self) -> None:
            self._executor.shutdown()

    return LLM


def install(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Make ``import tensorrt_llm`` find the stand-in until the test ends."""
    seen = StandIn()
    modules = {
        "tensorrt_llm._tensorrt_engine": {"LLM": _llm(seen)},
        "tensorrt_llm.llmapi": {
            "KvCacheConfig": KvCacheConfig, "MedusaDecodingConfig": MedusaDecodingConfig, "SamplingParams": SamplingParams,
        },
        "tensorrt_llm": {}, "tensorrt_llm.runtime": {"ModelRunnerCpp": _model_runner(seen)}, "tensorrt_llm.bindings": {},
        "tensorrt_llm.bindings.executor": {
            "Request": Request, "SamplingConfig": SamplingConfig, "OutputConfig": OutputConfig, "FinishReason": FinishReason,
        },
    }  # fmt: skip
    made = {}
    for name, members in modules.items():
        made[name] = ModuleType(name)
        made[name].__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made[name])
    made["tensorrt_llm.bindings"].executor = made["tensorrt_llm.bindings.executor"]  # type: ignore[attr-defined]
    return seen
