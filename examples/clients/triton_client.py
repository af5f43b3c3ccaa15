"""A repository of medusa-triton with NVIDIA's client: ``python triton_client.py 127.0.0.1:8001 "Why is the sky blue?"``"""

from __future__ import annotations

import queue
import sys
from typing import Any

import numpy as np
from tritonclient import grpc

SECONDS = 600.0  # to wait for a piece


def tensor(name: str, kind: str, value: Any, dtype: Any) -> grpc.InferInput:
    """One input of one value; the first axis is Triton's batch, of one request."""
    found = grpc.InferInput(name, [1, 1], kind)
    found.set_data_from_numpy(np.array([[value]], dtype))
    return found


address, question = sys.argv[1:]
inputs = [
    tensor("text_input", "BYTES", question.encode(), object),
    tensor("max_tokens", "INT32", 128, np.int32),
    tensor("stream", "BOOL", True, np.bool_),
]
answers: queue.Queue[Any] = queue.Queue()
with grpc.InferenceServerClient(address) as client:
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("medusa", inputs)
    is_done = False
    while not is_done:
        result, error = answers.get(timeout=SECONDS)
        if error is not None:
            raise SystemExit(f"error: {error}")
        print(result.as_numpy("text_output")[0, 0].decode(), end="", flush=True)
        is_done = bool(result.as_numpy("finish_reason")[0, 0])
    print(f"\n{result.as_numpy('tokens_per_step')[0, 0]:.2f} tokens per step", file=sys.stderr)
