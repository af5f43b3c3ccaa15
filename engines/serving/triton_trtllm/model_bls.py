"""Triton model that drives preprocessing and a TensorRT-LLM engine itself: whole characters, stop words, and what was accepted.

A repository holds a copy of this file as tensorrt_llm_bls/1/model.py, and one of ``stream_text`` in lib beside it. Every request
has a thread, which waits for the engine's responses and ends the engine's request when its client has gone.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from medusa_export.engines.serving.text_stream import TextStream

COUNTERS = ("total_accepted_draft_tokens", "total_draft_tokens")
ENGINE, PREPROCESSING = "tensorrt_llm", "preprocessing"


class TritonPythonModel:
    """Decoupled or not, as its configuration says."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the tokenizer beside this file."""
        import triton_python_backend_utils as pb_utils
        from transformers import AutoTokenizer

        self._pb = pb_utils
        config = json.loads(args["model_config"])
        self._decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled"))
        self._counts = config["parameters"]["acceptance"]["string_value"] == "true"
        directory = Path(args["model_repository"]) / args["model_version"] / "tokenizer"
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        self._threads: set[threading.Thread] = set()

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Called by Triton."""
        if not self._decoupled:
            return [self._whole(request) for request in requests]
        for request in requests:
            thread = threading.Thread(target=self._stream, args=(request, request.get_response_sender()), daemon=True)
            self._threads = {each for each in self._threads if each.is_alive()} | {thread}
            thread.start()
        return None

    def finalize(self) -> None:
        """Let open answers end."""
        for thread in self._threads:
            thread.join(30)

    def _whole(self, request: Any) -> Any:
        try:
            *_, last = self._pieces(request, lambda: False, stream=False)
        except self._pb.TritonModelException as error:
            return self._pb.InferenceResponse(error=self._pb.TritonError(str(error)))
        return self._response(last)

    def _stream(self, request: Any, sender: Any) -> None:
        stream = _flag(self._pb, request, "stream")
        final = self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            for piece in self._pieces(request, sender.is_cancelled, stream=stream):
                sender.send(self._response(piece))
            sender.send(flags=final)
        except self._pb.TritonModelException as error:
            sender.send(self._pb.InferenceResponse(error=self._pb.TritonError(str(error))), flags=final)
        except Exception:  # what a raise says holds paths
            failure = self._pb.TritonError("the answer could not be made", self._pb.TritonError.INTERNAL)
            sender.send(self._pb.InferenceResponse(error=failure), flags=final)

    def _pieces(self, request: Any, is_cancelled: Any, *, stream: bool) -> Iterator[dict[str, Any]]:
        """The answer in pieces, or as one, each with the numbers so far; the last piece says why it ended."""
        text, held = TextStream(self._tokenizer, _words(self._pb, request)), ""
        numbers = dict.fromkeys(("completion_tokens", "engine_steps", *COUNTERS), 0)
        with closing(self._engine(request, is_cancelled)) as outputs:
            for output in outputs:
                tokens = output["output_ids"].reshape(-1)[: int(output["sequence_length"].reshape(-1)[0])].tolist()
                numbers["engine_steps"] += bool(tokens)
                numbers |= {name: int(output[name].reshape(-1)[0]) for name in COUNTERS if name in output}
                for token in tokens:
                    held += text.feed(token)
                    numbers["completion_tokens"] += not text.is_stopped
                if stream and held:
                    yield {"text_output": held, **numbers}
                    held = ""
                if text.is_stopped:
                    break
        yield {"text_output": held + text.finish(), **numbers}

    def _engine(self, request: Any, is_cancelled: Any) -> Generator[dict[str, Any], None, None]:
        """Responses of the engine, until the last, the client's end, or the caller's."""
        pb = self._pb
        given = [tensor for tensor in request.inputs() if tensor.name() not in ("stream",)]
        wanted = ["input_ids", "input_lengths", "request_output_len", "end_id", "pad_id", "stop_words_list"]
        prepared = pb.InferenceRequest(model_name=PREPROCESSING, inputs=given, requested_output_names=wanted).exec()
        if prepared.has_error():
            raise pb.TritonModelException(prepared.error().message())
        inputs = list(prepared.output_tensors())
        names = ["output_ids", "sequence_length", *(COUNTERS if self._counts else ())]
        inputs.append(pb.Tensor("streaming", np.array([[self._decoupled]], dtype=bool)))
        if self._counts:
            inputs.append(pb.Tensor("return_perf_metrics", np.array([[True]], dtype=bool)))
        call = pb.InferenceRequest(model_name=ENGINE, inputs=inputs, requested_output_names=names)
        answers = call.exec(decoupled=True) if self._decoupled else [call.exec()]
        try:
            for answer in answers:
                if answer.has_error():
                    raise pb.TritonModelException(answer.error().message())
                output = {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
                if is_cancelled():
                    return
                if "output_ids" in output:
                    yield output
        finally:
            if hasattr(answers, "cancel"):  # a caller that needs no more must not leave the engine at work
                answers.cancel()

    def _response(self, values: dict[str, Any]) -> Any:
        tensors = [self._pb.Tensor("text_output", np.array([[values["text_output"].encode()]], dtype=np.object_))]
        numbers = ("completion_tokens", "engine_steps", *(COUNTERS if self._counts else ()))
        tensors += [self._pb.Tensor(name, np.array([[values[name]]], dtype=np.int32)) for name in numbers]
        return self._pb.InferenceResponse(output_tensors=tensors)


def _flag(pb_utils: Any, request: Any, name: str) -> bool:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return tensor is not None and bool(tensor.as_numpy().reshape(-1)[0])


def _words(pb_utils: Any, request: Any) -> list[str]:
    tensors = [pb_utils.get_input_tensor_by_name(request, name) for name in ("stop", "stop_words")]
    values = [value for tensor in tensors if tensor is not None for value in tensor.as_numpy().reshape(-1)]
    return [word for value in values if (word := value.decode("utf-8", "replace"))]
