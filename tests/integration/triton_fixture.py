"""A served tiny engine, and the clients that the Triton tests ask it with."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient import grpc

from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.serving.triton.hosting.server import Address, TritonServer
from medusa_export.engines.serving.triton.tensors import DTYPES, INPUTS
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree
from tests.integration.metrics import Metrics

TYPES = {port.name: port.data_type for port in INPUTS}
TREE = Tree.from_choices([[0], [1], [0, 0], [0, 0, 0]])
CONTEXT = 4000
MANY_LAYERS = 16  # a long answer takes seconds then: tests of what happens meanwhile do not race with it
SHARPNESS = 0.08
SECONDS = 60.0


def endless_engine(tiny_engine: Callable[..., Any], **config: Any) -> Path:
    """An engine whose answers only end where they are told to: long ones take seconds. Drawn ones differ from greedy ones."""
    sizes = {"max_length": CONTEXT, "max_position_embeddings": CONTEXT, "num_hidden_layers": MANY_LAYERS, **config}
    path: Path = tiny_engine(drafts_well=True, sharpness=SHARPNESS, tree=TREE, **sizes).path
    body = json.loads((path / "engine.json").read_text())
    (path / "engine.json").write_text(json.dumps({**body, "eos_token_ids": []}))
    return path


@dataclass
class Served:
    """A server and the engine that it serves, for comparison."""

    server: TritonServer
    engine: Path
    log: Path

    @property
    def address(self) -> Address:
        return self.server.address

    @property
    def metrics(self) -> Metrics:
        return Metrics(lambda: self.address.metrics)

    def offline(
        self, text: str, count: int, *, system: str = "", seed: int | None = None, temperature: float = 0.0
    ) -> list[int]:
        """The tokens that medusa-run's loop gives for a question."""
        messages = [{"role": "system", "content": system}] if system else []
        ids = encode_chat(read_tokenizer(self.engine), [*messages, {"role": "user", "content": text}])
        engine = OnnxRuntimeEngine(self.engine)
        sampler = Sampler(temperature, seed) if temperature else None
        return generate(engine, ids, AUTOREGRESSIVE, max_new_tokens=count, eos_token_ids=(), sampler=sampler).tokens

    def http(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a POST; ``body`` may be bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address.http}/v2/{path}", data)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def generate(self, model: str = "medusa", **inputs: Any) -> tuple[int, Any]:
        """``/generate``."""
        return self.http(f"models/{model}/generate", inputs)

    def events(self, **inputs: Any) -> Iterator[dict[str, Any]]:
        """``/generate_stream``."""
        body = json.dumps({"stream": True, **inputs}).encode()
        url = f"{self.address.http}/v2/models/medusa/generate_stream"
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=SECONDS) as response:
            for line in response:
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])


def tensors(**inputs: Any) -> list[Any]:
    """Inputs of a gRPC request, as NVIDIA's clients send them: with a batch axis of 1."""
    made = []
    for name, value in inputs.items():
        kind, values = TYPES[name], value if isinstance(value, list) else [value]
        encoded = [[item.encode() if kind == "STRING" else item for item in values]]
        tensor = grpc.InferInput(name, [1, len(values)], "BYTES" if kind == "STRING" else kind)
        made.append(tensor.set_data_from_numpy(np.array(encoded, dtype=DTYPES[kind])))
    return made


class Stream:
    """One bidirectional gRPC stream; answers come in the order in which they are sent, with the id of their request."""

    def __init__(self, address: str) -> None:
        self.client = grpc.InferenceServerClient(address)
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def ask(self, request_id: str, model: str = "medusa", **inputs: Any) -> None:
        self.client.async_stream_infer(
            model, tensors(**inputs), request_id=request_id, enable_empty_final_response=True
        )

    def next(self) -> tuple[Any, Any]:
        """The next answer, or error."""
        return self.answers.get(timeout=SECONDS)

    def collect(self, count: int) -> dict[str, tuple[list[int], str, str]]:
        """Of so many requests, by id: token ids, text and why they ended."""
        found: dict[str, tuple[list[int], str, str]] = {}
        ended: set[str] = set()
        while len(ended) < count:
            result, error = self.next()
            assert error is None, error
            response = result.get_response()
            ids, text, reason = found.get(response.id, ([], "", ""))
            if response.outputs:
                ids = [*ids, *result.as_numpy("token_ids")[0].tolist()]
                text += result.as_numpy("text_output")[0, 0].decode()
                reason = result.as_numpy("finish_reason")[0, 0].decode()
            found[response.id] = ids, text, reason
            if response.parameters["triton_final_response"].bool_param:
                ended.add(response.id)
        return found

    def close(self, *, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()
