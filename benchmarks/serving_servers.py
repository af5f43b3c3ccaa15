"""The servers of the load test, as a user starts them, and what asks them."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from serving_client import Answer, Client, NoAnswerError, Part, Question

from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.triton.hosting.server import Address, TritonServer
from medusa_export.engines.serving.triton.repository import write_repository

MODEL = "medusa"
REQUEST_SECONDS = 600.0
START_SECONDS = 300.0
KINDS = {"text_input": "BYTES", "system": "BYTES", "max_tokens": "INT32", "stream": "BOOL"}
DTYPES: dict[str, Any] = {"BYTES": np.object_, "INT32": np.int32, "BOOL": np.bool_}
EXIT_SECONDS = 1  # nothing is in flight then, but Triton 2.51 may hold on to a stream that was cancelled as it ended
BUSY = "that wait"  # what both servers say of a full queue
PROGRAM = Path(sys.executable).with_name("medusa-serve")


@dataclass(frozen=True)
class Running:
    """A server that is ready.

    Attributes:
        processes: their ids now, by what they are.
        connect: one client for all streams, in a running event loop.
        versions: of what serves and what asks.
        complete: has to be called with every answer before it is judged.
    """

    processes: Callable[[], dict[str, list[int]]]
    connect: Callable[[], AbstractAsyncContextManager[Client]]
    versions: dict[str, str]
    complete: Callable[[Answer], None] = lambda answer: None


@contextmanager
def triton(engine_dir: Path, tree: Path | None, options: ServingOptions, folder: Path) -> Iterator[Running]:
    """tritonserver on the repository that medusa-triton writes."""
    write_repository(engine_dir, folder / "repository", options=options, tree=tree)
    with (folder / "server.log").open("wb") as log:
        server = TritonServer(folder / "repository", Address.free(), log, exit_seconds=EXIT_SECONDS)
    try:
        server.wait_ready()
        with urllib.request.urlopen(f"{server.address.http}/v2") as response:
            version = str(json.load(response)["version"])
        yield Running(
            lambda: {"server": [server.process.pid], "stubs": server.stubs()},
            lambda: _triton_client(server.address.grpc),
            {"tritonserver": version, "tritonclient": importlib.metadata.version("tritonclient")},
        )
    finally:
        server.stop()


@contextmanager
def openai(engine_dir: Path, tree: Path | None, options: ServingOptions, folder: Path) -> Iterator[Running]:
    """medusa-serve."""
    flags = {f"--{item.name.replace('_', '-')}": getattr(options, item.name) for item in fields(options)}
    flags["--max-concurrent"] = flags.pop("--max-batch")
    flags |= {"--engine": engine_dir, "--port": 0, "--name": MODEL, **({"--tree": tree} if tree else {})}
    command = [str(PROGRAM), *(f"{part}" for flag in flags.items() for part in flag)]
    out = folder / "serve.out"
    with out.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, tokenizer = find_url(process, out), read_tokenizer(engine_dir)
        yield Running(
            lambda: {"server": [process.pid]},
            lambda: openai_client(url, tokenizer),
            {name: importlib.metadata.version(name) for name in ("uvicorn", "fastapi", "openai")},
            lambda answer: _find_tokens(answer, tokenizer),
        )
    finally:
        process.terminate()
        process.wait()


Serve = Callable[[Path, Path | None, ServingOptions, Path], AbstractContextManager[Running]]
SERVERS: dict[str, Serve] = {"triton": triton, "openai": openai}


@asynccontextmanager
async def _triton_client(address: str) -> AsyncIterator[Client]:
    from tritonclient.grpc.aio import InferenceServerClient

    async with InferenceServerClient(address) as client:
        yield _TritonClient(client)


class _TritonClient:
    """Streams of one gRPC channel."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def parts(self, question: Question, request_id: str, max_tokens: int) -> AsyncGenerator[Part, None]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": MODEL, "inputs": _inputs(question, max_tokens), "request_id": request_id,
                "enable_empty_final_response": True,
            }  # fmt: skip

        stream = self._client.stream_infer(requests(), stream_timeout=REQUEST_SECONDS)
        is_last = False
        try:
            while not is_last:
                result, error = await anext(stream)
                part = _part(result, error, request_id)
                is_last = part.is_last
                yield part
        except StopAsyncIteration:
            return
        finally:
            if not is_last:
                stream.cancel()


def _part(result: Any, error: Any, request_id: str) -> Part:
    if error is not None:
        raise NoAnswerError("busy" if BUSY in error.message() else "error", error.message())
    response = result.get_response()
    if response.id != request_id:
        raise NoAnswerError("mixed up", f"a response of request {response.id}")
    is_last = response.parameters["triton_final_response"].bool_param
    if not response.outputs:
        return Part([], "", is_last=is_last)
    tokens, text = result.as_numpy("token_ids")[0].tolist(), result.as_numpy("text_output")[0, 0].decode()
    return Part(tokens, text, float(result.as_numpy("tokens_per_step")[0, 0]), is_last)


def _inputs(question: Question, max_tokens: int) -> list[Any]:
    from tritonclient.grpc.aio import InferInput

    given = {"text_input": question.messages[-1]["content"].encode(), "max_tokens": max_tokens, "stream": True}
    if len(question.messages) > 1:
        given["system"] = question.messages[0]["content"].encode()
    made: list[Any] = []
    for name, value in given.items():
        values = np.array([[value]], dtype=DTYPES[KINDS[name]])
        made.append(InferInput(name, [1, 1], KINDS[name]).set_data_from_numpy(values))
    return made


@asynccontextmanager
async def openai_client(url: str, tokenizer: Any, model: str = MODEL) -> AsyncIterator[Client]:
    """Asks any server of OpenAI's protocol.

    Args:
        url: up to ``/v1``.
        tokenizer: counts the tokens of a text.
        model: its name there.
    """
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=REQUEST_SECONDS) as client:
        yield _OpenAIClient(client, tokenizer, model)


class _OpenAIClient:
    """The protocol has texts, no tokens: those of each piece are the tokenizer's."""

    def __init__(self, client: Any, tokenizer: Any, model: str) -> None:
        self._client, self._tokenizer, self._model = client, tokenizer, model

    async def parts(self, question: Question, request_id: str, max_tokens: int) -> AsyncGenerator[Part, None]:
        from openai import APIError, RateLimitError

        ids: set[str] = set()
        try:
            stream = await self._client.chat.completions.create(
                model=self._model, messages=question.messages, max_tokens=max_tokens, temperature=0, stream=True
            )
            async with stream:
                async for chunk in stream:
                    ids.add(chunk.id)
                    if len(ids) > 1:
                        raise NoAnswerError("mixed up", f"a response of {chunk.id}")
                    yield self._part(chunk)
        except RateLimitError as error:
            raise NoAnswerError("busy", error.message) from error
        except APIError as error:
            raise NoAnswerError("error", f"{error.message}{_causes(error)}") from error

    def _part(self, chunk: Any) -> Part:
        if not chunk.choices:  # of figures only
            return Part([], "")
        choice = chunk.choices[0]
        text = choice.delta.content or ""
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        said = (chunk.model_extra or {}).get("medusa", {})
        return Part(tokens, text, said.get("tokens_per_step", 0.0), choice.finish_reason is not None)


def _causes(error: BaseException) -> str:
    """What lies behind a client's "Connection error.", the outermost first."""
    causes = []
    while (cause := error.__cause__ or error.__context__) is not None:
        causes.append(f"{type(cause).__name__}: {cause}")
        error = cause
    return f" ({'; '.join(dict.fromkeys(causes))})" if causes else ""


def _find_tokens(answer: Answer, tokenizer: Any) -> None:
    """The tokens of an answer's text: the offline answer's as far as they have this text, then the tokenizer's."""
    ours = answer.question.tokens
    texts = [tokenizer.decode(ours[:count], skip_special_tokens=True) for count in range(len(ours) + 1)]
    count = max(count for count, text in enumerate(texts) if answer.text.startswith(text))
    rest = tokenizer(answer.text[len(texts[count]) :], add_special_tokens=False)["input_ids"]
    answer.tokens = [*ours[:count], *rest]


def find_url(process: subprocess.Popen[bytes], out: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while not (found := re.search(r"serving (http://\S+/v1);", out.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"medusa-serve did not start: {out.read_text()}")
        time.sleep(0.05)
    return found[1]
