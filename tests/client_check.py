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
from collections.abc import Callable, Iterator
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
        request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            lines = response.read().decode().split("\n\n")
        usage = json.loads(lines[-3].removeprefix("data: "))["usage"]
        assert usage["completion_tokens"] == 12, usage


CHECKS: dict[str, Callable[[str], None]] = {
    "openai": check_openai, "litellm": check_litellm, "langchain-openai": check_langchain, "vllm bench serve": check_vllm_bench,
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
