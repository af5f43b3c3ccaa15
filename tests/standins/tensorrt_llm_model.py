"""A stand-in for the model ``tensorrt_llm``, whose backend is not here: it gives the prompt back, a few tokens a step.

Its configuration is the real one but for the backend. It reads what the tensorrtllm backend reads, in its shapes, and checks them.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

STEP = 3


class TritonPythonModel:
    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except AssertionError as error:
                message = pb_utils.InferenceResponse(error=pb_utils.TritonError(f"stand-in: {error}"))
                sender.send(message, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, sender: Any) -> None:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        ids, length = given["input_ids"], given["input_lengths"]
        assert ids.dtype == np.int32, ids.dtype
        assert (ids.ndim, ids.shape[0], length.shape) == (2, 1, (1,)), (ids.shape, length.shape)
        assert ids.shape[1] == length[0]
        assert given["request_output_len"].shape == (1,)
        assert given["stop_words_list"].shape[:2] == (1, 2)
        answer = self._tokens(ids[0].tolist(), int(given["request_output_len"][0]), int(given["end_id"][0]), given)
        streaming = bool(given.get("streaming", np.array([False])).reshape(-1)[0])
        steps = [answer[at : at + STEP] for at in range(0, len(answer), STEP)] if streaming else [answer]
        names = set(request.requested_output_names())
        for number, step in enumerate(steps, start=1):
            if sender.is_cancelled():
                break
            tensors = {
                "output_ids": np.array([[step]], np.int32),
                "sequence_length": np.array([[len(step)]], np.int32),
                "total_accepted_draft_tokens": np.array([[number * (STEP - 1)]], np.int32),
                "total_draft_tokens": np.array([[number * 3]], np.int32),
            }
            made = [pb_utils.Tensor(name, array) for name, array in tensors.items() if name in names]
            sender.send(pb_utils.InferenceResponse(output_tensors=made))
            time.sleep(0.005 if streaming else 0)
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _tokens(self, prompt: list[int], count: int, end_id: int, given: dict[str, Any]) -> list[int]:
        words = self._words(given["stop_words_list"][0])
        answer: list[int] = []
        while len(answer) < count:
            answer.append(prompt[len(answer) % len(prompt)])
            if answer[-1] == end_id or any(answer[-len(word) :] == word for word in words):
                break
        return answer

    def _words(self, table: Any) -> list[list[int]]:
        """As TensorRT-LLM reads them: tokens in a row, and where each word ends; -1 ends the list."""
        ends = [int(end) for end in table[1] if end != -1]
        return [table[0, start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]
