"""A stand-in for the part of ``tensorrt_llm`` that the runner uses: ModelRunnerCpp and its executor, with their argument names.

It is no model: the next token is a fixed function of the last one and of the length, and a "Medusa" engine accepts a fixed number of
tokens a step. What it proves is that our side asks for the right things, and reads what comes back rightly.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
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
    """Attributes: strays: at which generated token a "Medusa" engine answers something else; None: never."""

    medusa_choices: list[list[int]] | None
    strays: int | None = None
    open: bool = True
    requests: list[Request] = field(default_factory=list)

    def enqueue_request(self, request: Request) -> int:
        assert self.open
        assert request.output_config.exclude_input_from_output
        assert request.sampling_config == SamplingConfig(beam_width=1, top_k=1)
        self.requests.append(request)
        return len(self.requests) - 1

    def await_responses(self, number: int) -> list[Any]:
        request = self.requests[number]
        if len(request.input_token_ids) > 100:
            return [
                SimpleNamespace(has_error=lambda: True, error_msg="prompt is longer than max_input_len", result=None)
            ]
        steps = self._steps(request)
        if not request.streaming:
            steps = [[token for step in steps for token in step]]
        return [
            SimpleNamespace(has_error=lambda: False, result=self._result(request, step, last=index == len(steps) - 1))
            for index, step in enumerate(steps)
        ]

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

    def _result(self, request: Request, tokens: list[int], *, last: bool) -> Any:
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
class StandIn:
    """What was asked of it. Attributes: opened: (directory's name, arguments) of every from_dir; executors: what it gave."""

    opened: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    executors: list[StandInExecutor] = field(default_factory=list)
    strays: int | None = None


def install(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Make ``import tensorrt_llm`` find the stand-in until the test ends."""
    seen = StandIn()

    class ModelRunnerCpp:
        def __init__(self, executor: StandInExecutor) -> None:
            self.executor = executor

        @classmethod
        def from_dir(
            cls, engine_dir: str, *, rank: int = 0, medusa_choices: list[list[int]] | None = None,
            max_tokens_in_paged_kv_cache: int | None = None, is_orchestrator_mode: bool = False,
            device_ids: list[int] | None = None, gather_generation_logits: bool = False,
        ) -> ModelRunnerCpp:  # fmt: skip
            given = {key: value for key, value in locals().items() if key not in ("cls", "engine_dir")}
            config = json.loads((Path(engine_dir) / "config.json").read_text())
            mode = config["build_config"]["speculative_decoding_mode"]
            assert (mode == 4) == (medusa_choices is not None), "without choices TensorRT-LLM takes its own tree"
            seen.opened.append((Path(engine_dir).name, given))
            seen.executors.append(StandInExecutor(medusa_choices, seen.strays))
            return cls(seen.executors[-1])

    modules = {
        "tensorrt_llm": {}, "tensorrt_llm.runtime": {"ModelRunnerCpp": ModelRunnerCpp}, "tensorrt_llm.bindings": {},
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
