"""Others' clients against medusa-serve: ``client_check.py MEDUSA_SERVE ENGINE``, in an environment that has those clients.

Run by ``make client-check``. It says a line a client, and ends with 1 where one of them is not served.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

MODEL, QUESTION = "checked", [{"role": "user", "content": "Name a city."}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip
LONG = "word " * 5000


@contextmanager
def served(program: str, engine: str) -> Iterator[str]:
    """The address of a server, which ends with it."""
    command = [program, "--engine", engine, "--port", "0", "--name", MODEL]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            found = next((found for line in process.stdout if (found := re.search(r"serving (\S+);", line))), None)
            assert found, "the server did not start"
            yield found[1]
        finally:
            process.terminate()


def check_openai(url: str) -> None:
    """Every field that is honoured, with the client itself."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    several = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=2, max_tokens=8, logprobs=True, top_logprobs=2, temperature=0.7, seed=1,
        frequency_penalty=0.3, extra_body={"top_k": 20, "min_p": 0.01, "unheard_of": 1},
    )  # fmt: skip
    assert len(several.choices) == 2
    assert several.choices[0].logprobs.content
    shaped = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}},
    )  # fmt: skip
    assert set(json.loads(shaped.choices[0].message.content)) == {"city"}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
    called = client.chat.completions.create(
        model=MODEL, messages=QUESTION, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=80
    )
    (call,) = called.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city"}
    echoed = client.completions.create(model=MODEL, prompt=["One", "Two"], echo=True, max_tokens=3)
    assert [choice.text[:3] for choice in echoed.choices] == ["One", "Two"]


def check_litellm(url: str) -> None:
    """Answers and its own class of errors."""
    import litellm

    arguments: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": url, "api_key": "none"}
    answer = litellm.completion(messages=QUESTION, max_tokens=5, **arguments)
    assert answer.choices[0].message.content
    try:
        litellm.completion(messages=[{"role": "user", "content": LONG}], **arguments)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("no ContextWindowExceededError")


def check_langchain(url: str) -> None:
    """Streams, structured output, tools, and its own class of errors."""
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=url, api_key="none", model=MODEL, max_tokens=80, temperature=0, max_retries=0)
    assert "".join(chunk.content for chunk in model.stream("Name a city."))
    found = model.with_structured_output({"title": "city", **SCHEMA}, method="json_schema").invoke("Name a city.")
    assert set(found) == {"city"}
    tool = {"type": "function", "function": {"name": "look_up", "description": "Looks up", "parameters": SCHEMA}}
    assert model.bind_tools([tool], tool_choice="look_up").invoke("Name a city.").tool_calls[0]["name"] == "look_up"
    try:
        model.invoke(LONG)
    except ContextOverflowError:
        return
    raise AssertionError("no ContextOverflowError")


def check_vllm_bench(url: str) -> None:
    """What ``vllm bench serve`` sends (0.11, backend openai and openai-chat); the package itself is too large for this."""
    shared = {"model": MODEL, "temperature": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "stream": True,
              "stream_options": {"include_usage": True}}  # fmt: skip
    bodies: dict[str, dict[str, Any]] = {
        "/completions": {**shared, "prompt": "One two", "max_tokens": 12, "logprobs": None},
        "/chat/completions": {**shared, "max_completion_tokens": 12, "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Name a city."}]}]},
    }  # fmt: skip
    for path, body in bodies.items():
        assert streamed(url + path, body)[-1]["usage"]["completion_tokens"] == 12


def check_guidellm(url: str) -> None:
    """What guidellm sends (0.8.1, synthetic prompts, its own first questions); the package itself brings torch with it."""
    headers = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "python-httpx/0.28.1"}
    for path in (f"{url.removesuffix('/v1')}/health", f"{url}/models"):
        with urllib.request.urlopen(urllib.request.Request(path, headers=headers), timeout=30) as response:
            found = response.read()
    assert json.loads(found)["data"][0]["id"] == MODEL
    shared = {"model": MODEL, "ignore_eos": True, "stream": True,
              "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Name a city."}]},
    ]
    bodies: dict[str, dict[str, Any]] = {
        "/completions": {**shared, "max_tokens": 12, "prompt": "One two"},
        "/chat/completions": {**shared, "max_completion_tokens": 12, "messages": messages},
    }
    for path, body in bodies.items():
        chunks = streamed(url + path, body, headers)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]  # every chunk has it
        assert counts == sorted(counts), counts
        assert (counts[-1], chunks[-1]["choices"]) == (12, [])


def check_aiperf(url: str) -> None:
    """What ``aiperf profile --streaming`` sends (0.13.0); the package itself brings 137 others with it."""
    headers = {"Accept": "text/event-stream", "User-Agent": "aiperf/0.13.0", "X-Request-ID": "8c1b7f52-3d0e-4a6f-9a44-1de2a3c4b5f6",
               "X-Correlation-ID": "f0a9d8c7-1b2c-4d3e-8f90-a1b2c3d4e5f6"}  # fmt: skip
    shared = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}
    inputs = {"ignore_eos": True, "min_tokens": 12}  # --extra-inputs
    messages = [{"role": "user", "content": "Name a city."}]
    bodies: dict[str, dict[str, Any]] = {
        "/completions": {"prompt": "One two", "max_tokens": 12, **shared, **inputs},
        "/chat/completions": {"messages": messages, "max_completion_tokens": 12, **shared, **inputs},
    }
    for path, body in bodies.items():
        assert streamed(url + path, body, headers)[-1]["usage"]["completion_tokens"] == 12


def streamed(address: str, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> list[Any]:
    """The chunks of a stream that is complete."""
    given = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(address, json.dumps(body).encode(), given)
    with urllib.request.urlopen(request, timeout=300) as response:
        *lines, done, end = response.read().decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", ""), (done, end)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


CHECKS: dict[str, Callable[[str], None]] = {
    "openai": check_openai, "litellm": check_litellm, "langchain-openai": check_langchain, "vllm bench serve": check_vllm_bench,
    "guidellm": check_guidellm, "aiperf": check_aiperf,
}  # fmt: skip


def main(program: str, engine: str) -> int:
    """Check all clients, and say which are served."""
    failed = 0
    with served(program, engine) as url:
        for name, check in CHECKS.items():
            start = time.monotonic()
            try:
                check(url)
            except Exception:
                traceback.print_exc()
                failed += 1
                print(f"{name}: not served")
            else:
                print(f"{name}: served ({time.monotonic() - start:.0f} s)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
