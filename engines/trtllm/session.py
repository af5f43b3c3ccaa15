"""Decodes with a TensorRT-LLM engine, with Medusa or without, and says how many tokens every step gave.

This file needs tensorrt_llm and nothing else of its project: an export holds a copy of it as run.py. Through ModelRunnerCpp of the
engine backend (TensorRT-LLM 0.17 to 1.2.1) and its executor. In streaming mode the executor answers once a step, with the tokens that
the step accepted. Sources: tensorrt_llm/runtime/model_runner_cpp.py, bindings/executor.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT = 600.0  # seconds; the first request may compile
STOPPED = ("END_ID", "STOP_WORDS")  # members of the executor's FinishReason


@dataclass(frozen=True)
class StepTokens:
    """What one step gave; the first one is the prefill.

    Attributes:
        seconds: since the request was sent.
        finish_reason: "" until the last step, then "stop" or "length".
        drafts: as the runtime counts them itself, of the whole request so far: accepted, and all. None where it does not.
    """

    tokens: list[int]
    seconds: float
    finish_reason: str
    drafts: tuple[int, int] | None = None


class NoAnswerError(RuntimeError):
    """The runtime was silent for too long."""


class Session:
    """One engine on its GPUs. Greedy, one request at a time.

    Args:
        engine_dir: what trtllm-build wrote, with config.json and rank{r}.engine.
        medusa_choices: the whole tree, parents before children; None for an engine without Medusa.
        max_tokens: room in the KV cache, so that two engines fit side by side.
        timeout: seconds to wait for a step, or for an answer that does not come in steps.
        windows: tokens that every layer looks back, or each of them; None is all.
    """

    def __init__(
        self,
        engine_dir: Path,
        medusa_choices: list[list[int]] | None,
        max_tokens: int,
        *,
        timeout: float = TIMEOUT,
        windows: int | list[int] | None = None,
    ) -> None:
        from tensorrt_llm.bindings import executor
        from tensorrt_llm.runtime import ModelRunnerCpp

        config = json.loads((engine_dir / "config.json").read_text(encoding="utf-8"))
        tp = config["pretrained_config"]["mapping"]["tp_size"]
        options: dict[str, Any] = {"medusa_choices": medusa_choices, "max_tokens_in_paged_kv_cache": max_tokens}
        if windows:
            options["max_attention_window_size"] = as_list(windows)
        if tp > 1:  # it starts the other ranks itself, so that this process needs no mpirun
            options |= {"is_orchestrator_mode": True, "device_ids": list(range(tp))}
        if (
            "gather_generation_logits" in inspect.signature(ModelRunnerCpp.from_dir).parameters
        ):  # not yet in old releases
            options["gather_generation_logits"] = True
        self._api, self._timeout = executor, timeout
        self._counts = hasattr(executor.OutputConfig(), "return_perf_metrics")  # not yet in old releases
        self._runner = ModelRunnerCpp.from_dir(str(engine_dir), rank=0, **options)

    def stream(
        self, input_ids: Sequence[int], max_new_tokens: int, end_ids: Sequence[int] = ()
    ) -> Iterator[StepTokens]:
        """The tokens of each step, as they come.

        Args:
            end_ids: the first ends the text as end_id, the others as stop words; each is among the tokens that it ends.

        Raises:
            RuntimeError: what the executor says about a request that it refuses.
            NoAnswerError: no step within the time; the request is cancelled.
        """
        start = time.perf_counter()
        for result in self._responses(self._request(input_ids, max_new_tokens, end_ids, streaming=True)):
            reason = self._reason(result)
            tokens = [int(token) for token in result.output_token_ids[0]]
            missing_end = reason == "stop" and end_ids and (not tokens or tokens[-1] not in end_ids)
            tokens += [end_ids[0]] if missing_end else []
            yield StepTokens(
                tokens, time.perf_counter() - start, reason, drafts(getattr(result, "request_perf_metrics", None))
            )

    def generation_logits(self, input_ids: Sequence[int], new_tokens: int) -> tuple[list[int], Any]:
        """The tokens that follow, and the logits that each was chosen by.  # [T], float32 [T, vocab_size]"""
        request = self._request(input_ids, new_tokens, (), streaming=False, logits=True)
        *_, result = self._responses(request)
        tokens = [int(token) for token in result.output_token_ids[0]]
        return tokens, result.generation_logits[0].float().cpu().numpy()[: len(tokens)]

    def close(self) -> None:
        """Give the GPU's memory back."""
        self._runner.executor.shutdown()

    def _request(
        self,
        input_ids: Sequence[int],
        max_tokens: int,
        end_ids: Sequence[int],
        *,
        streaming: bool,
        logits: bool = False,
    ) -> Any:
        api = self._api
        output = api.OutputConfig(exclude_input_from_output=True, return_generation_logits=logits)
        if self._counts:
            output.return_perf_metrics = True
        return api.Request(
            input_token_ids=list(input_ids), max_tokens=max_tokens, streaming=streaming, output_config=output,
            sampling_config=api.SamplingConfig(beam_width=1, top_k=1), end_id=end_ids[0] if end_ids else -1,
            stop_words=[[token] for token in end_ids[1:]],
        )  # fmt: skip

    def _responses(self, request: Any) -> Iterator[Any]:
        executor, wait = self._runner.executor, timedelta(seconds=self._timeout)
        number = executor.enqueue_request(request)
        while True:
            responses = executor.await_responses(number, timeout=wait)
            if not responses:
                executor.cancel_request(number)
                raise NoAnswerError(f"no answer within {self._timeout:g} seconds")
            for response in responses:
                if response.has_error():
                    raise RuntimeError(response.error_msg)
                yield response.result
                if response.result.is_final:
                    return

    def _reason(self, result: Any) -> str:
        if not result.is_final:
            return ""
        reasons = [str(reason).rsplit(".", 1)[-1] for reason in result.finish_reasons]
        return "stop" if reasons and reasons[0] in STOPPED else "length"


def drafts(metrics: Any) -> tuple[int, int] | None:
    """Accepted drafts and all drafts, from a result's request_perf_metrics; None where there are none."""
    counted = getattr(metrics, "speculative_decoding", None)
    return None if counted is None else (int(counted.total_accepted_draft_tokens), int(counted.total_draft_tokens))


def as_list(windows: int | list[int]) -> list[int]:
    """One window for all layers, or one for each."""
    return windows if isinstance(windows, list) else [windows]


def main() -> None:
    """Answer one prompt with Medusa, then without, and print both speeds."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--engine", type=Path, default=Path(__file__).parent, help="what build.sh wrote; here")
    parser.add_argument("--prompt", default="What is speculative decoding? Answer in three sentences.")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds to wait for a step")
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.engine, local_files_only=True)
    info = json.loads((arguments.engine / "engine.json").read_text(encoding="utf-8"))
    choices = json.loads((arguments.engine / "tree.json").read_text(encoding="utf-8"))["medusa_choices"]
    messages = [{"role": "user", "content": arguments.prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    input_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for name, tree in (("medusa", choices), ("baseline", None)):
        session = Session(
            arguments.engine / name,
            tree,
            2 * info["max_length"],
            timeout=arguments.timeout,
            windows=info["source"].get("sliding_window"),
        )
        list(session.stream(input_ids, 16, info["eos_token_ids"]))  # the first request also warms up
        steps = list(session.stream(input_ids, arguments.max_new_tokens, info["eos_token_ids"]))
        session.close()
        tokens = [token for step in steps for token in step.tokens]
        rate, per_step = len(tokens) / steps[-1].seconds, (len(tokens) - 1) / max(len(steps) - 1, 1)
        print(f"{name}: {len(tokens)} tokens, {rate:.1f} tokens/s, {per_step:.2f} tokens per step")
        if tree and steps[-1].drafts:
            print("the runtime counts {} accepted drafts of {}".format(*steps[-1].drafts))
        print(tokenizer.decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
