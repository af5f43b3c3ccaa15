"""OpenAIServers against a real HTTP server that fails in every way."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError, MissingPackageError
from medusa_export.heads.data.chat_model import AnswerError, ChatAnswer, ModelUnavailableError
from medusa_export.heads.data.openai_client import SET_ASIDE, OpenAIServers, open_servers
from medusa_export.heads.decoding.sampling import Sampling

Start = Callable[[], Any]
HI = [{"role": "user", "content": "Hi"}]
YES = ChatAnswer("Hi!", "stop", 3)


def ask(model: OpenAIServers, *texts: str, sampling: Sampling = Sampling()) -> list[Any]:  # noqa: B008
    """Answers, or errors, to several questions at once."""

    async def run() -> list[Any]:
        questions = [model.answer([{"role": "user", "content": text}], sampling) for text in texts]
        try:
            return await asyncio.gather(*questions, return_exceptions=True)
        finally:
            await model.close()

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


def test_what_is_sent_and_what_comes_back(fake_server: Start) -> None:
    server = fake_server()
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=7, seed=3)
    assert ask(open_servers([server.url]), "Hi", sampling=sampling) == [YES]
    assert server.requests == [
        {"model": "tiny", "messages": HI, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    ]
    assert ask(open_servers([f"{server.url}/v1/"], model="other"), "Hi") == [YES]
    assert server.requests[1] == {"model": "other", "messages": HI, "max_tokens": 256, "temperature": 0, "top_p": 1}


@pytest.mark.parametrize(
    "faults",
    [
        [500, 503, 502],
        ["disconnect"] * 3,
        ["truncated"] * 3,
        ["damaged"] * 3,
        ["hang"],
        ["partial"],
        [{"choices": []}, {"choices": None}, {"usage": None}],
        [{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}, {"choices": [{}]}, {"usage": {}}],
        [408, 409],
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(fake_server: Start, faults: list[Any]) -> None:
    server = fake_server()
    model = open_servers([server.url], timeout=0.5, retries=3)
    server.faults = list(faults)
    assert ask(model, "Hi") == [YES]
    assert server.asked == ["Hi"] * (len(faults) + 1)


def test_a_server_that_is_busy_says_when_to_come_back(fake_server: Start) -> None:
    server = fake_server()
    model, started = open_servers([server.url]), time.monotonic()
    server.faults = [429]
    assert ask(model, "Hi") == [YES]
    assert time.monotonic() - started >= 1.0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "status 500"),
        (429, "status 429"),
        ("hang", "timed out"),
        ("disconnect", "disconnected"),
        ("truncated", "incomplete|closed"),
        ("damaged", "no whole answer: JSONDecodeError"),
        ({"usage": None}, "no whole answer: TypeError"),
    ],
    ids=str,
)
def test_what_does_not_pass(fake_server: Start, fault: Any, reason: str) -> None:
    server = fake_server()
    model = open_servers([server.url], timeout=0.3, retries=1)
    server.faults = [fault, fault]
    (error,) = ask(model, "Hi")
    assert isinstance(error, AnswerError)
    assert error.where == f"{server.url}/v1"
    assert re.search(reason, str(error), re.IGNORECASE), str(error)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (400, AnswerError, "status 400.*change this conversation"),
        (422, AnswerError, "status 422"),
        (401, ModelUnavailableError, "status 401.*see OPENAI_API_KEY"),
        (404, ModelUnavailableError, "status 404.*check the URL and --model"),
    ],
)
def test_what_is_refused_is_not_tried_again(
    fake_server: Start, status: int, kind: type[Exception], message: str
) -> None:
    servers = [fake_server(), fake_server()]
    (error,) = ask(open_servers([server.url for server in servers], model="tiny"), f"status {status}")
    with pytest.raises(kind, match=message):
        raise error
    assert sum(len(server.requests) for server in servers) == 1


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_name_that_is_not_listed_and_not_answered_is_the_reason(fake_server: Start, status: int) -> None:
    server = fake_server()
    (error,) = ask(open_servers([server.url], model="typo", retries=0), f"status {status}")
    assert isinstance(error, ModelUnavailableError)
    assert re.search(rf"status {status}.*a server of typo; it lists tiny: correct --model", str(error)), str(error)


def test_a_server_may_have_more_than_it_lists(fake_server: Start) -> None:
    server = fake_server()

    async def run() -> list[Any]:
        model = open_servers([server.url], model="alias", retries=0)
        questions = [[{"role": "user", "content": text}] for text in ("Hi", "status 400")]
        return [await model.answer(questions[0], Sampling()), *await asyncio.gather(
            model.answer(questions[1], Sampling()), return_exceptions=True)]  # fmt: skip

    answer, error = asyncio.run(run())
    assert answer == YES
    assert isinstance(error, AnswerError)  # the name was good for the first one: it is this conversation


def test_a_server_that_fails_all_the_time(fake_server: Start) -> None:
    server = fake_server()
    model = open_servers([server.url], retries=0)
    errors = ask(model, *["status 500"] * SET_ASIDE)
    assert [type(error) for error in errors].count(ModelUnavailableError) >= 1
    assert "3 failures in a row (Error code: 500 - status 500); expected answers" in str(errors)


def test_failures_in_a_row_end_with_an_answer(fake_server: Start) -> None:
    server = fake_server()
    model = open_servers([server.url], retries=0)

    async def run() -> list[str]:
        found = []
        for text in ("status 500", "status 500", "Hi", "status 500", "status 500", "Hi"):
            try:
                found.append((await model.answer([{"role": "user", "content": text}], Sampling())).text)
            except AnswerError:
                found.append("failed")
        return found

    assert asyncio.run(run()) == ["failed", "failed", "Hi!"] * 2


def test_servers_share_the_work(fake_server: Start) -> None:
    servers = [fake_server(), fake_server()]
    for server in servers:
        server.delay = lambda body: 0.1
    texts = [str(number) for number in range(8)]
    answers = ask(open_servers([server.url for server in servers]), *texts)
    assert [answer.text for answer in answers] == [f"{text}!" for text in texts]
    assert [len(server.requests) for server in servers] == [4, 4]


def test_a_server_that_dies_is_set_aside(fake_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    healthy, dying = fake_server(), fake_server()
    model = open_servers([dying.url, healthy.url], retries=0)
    dying.faults = [500] * 50
    texts = [str(number) for number in range(20)]

    async def run() -> list[str]:
        return [(await model.answer([{"role": "user", "content": text}], Sampling())).text for text in texts]

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(run()) == [f"{text}!" for text in texts]
    assert len(dying.requests) == SET_ASIDE
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("medusa_export")]
    assert [message.split(": ")[0] for message in ours] == [f"{dying.url}/v1"]


def test_the_key(fake_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = fake_server()
    server.key = "secret"
    with pytest.raises(ModelUnavailableError, match=r"wrong key.*see OPENAI_API_KEY"):
        open_servers([server.url], model="tiny")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert ask(open_servers([server.url]), "Hi") == [YES]


def test_nobody_there(fake_server: Start) -> None:
    with socket.socket() as reserved:  # bound, and nobody listens
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(ModelUnavailableError, match=r"Connection refused.*start it, or correct --server") as caught:
            open_servers([fake_server().url, url])
    assert caught.value.where == f"{url}/v1"


def test_the_only_model(fake_server: Start) -> None:
    one, two, other = fake_server(), fake_server(), fake_server()
    assert open_servers([one.url, two.url]).name == "tiny"
    other.models = ["large"]
    with pytest.raises(ConfigError, match=r"--model: got nothing, while .* list large, tiny; expected"):
        open_servers([one.url, other.url])
    other.models = []
    for urls in ([one.url, other.url], [other.url]):
        with pytest.raises(ConfigError, match="--model"):
            open_servers(urls)
    assert open_servers([other.url], model="tiny").name == "tiny"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "http://host:port", ""])
def test_no_url(url: str) -> None:
    with pytest.raises(ConfigError, match="--server"):
        open_servers([url])


@pytest.mark.parametrize("options", [{"timeout": 0.0}, {"timeout": float("nan")}, {"retries": -1}])
def test_options_out_of_range(options: dict[str, Any], fake_server: Start) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        open_servers([fake_server().url], **options)


def test_openai_is_loaded_late(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, medusa_export.heads.data.openai_client; print({'openai', 'httpx'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingPackageError, match=r"medusa-export\[data\]"):
        open_servers(["http://localhost"])


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("temperature", float("inf")), ("top_p", 0.0), ("max_tokens", 0)]
)
def test_sampling_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampling(**{field: value})
