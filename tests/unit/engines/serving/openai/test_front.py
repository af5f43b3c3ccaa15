"""What a request has to get past, and clients that go away at awkward moments; the text service is a stand-in."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.front import FrontOptions, OpenAIFront
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from medusa_export.engines.serving.openai.protocol.answers import CHAT_SHAPE, TEXT_SHAPE
from medusa_export.engines.serving.openai.protocol.errors import (
    BodySizeError,
    FramingError,
    HostRefusedError,
    KeyRefusedError,
    MediaTypeError,
    UnfinishedError,
    UnsupportedError,
)
from medusa_export.engines.serving.openai.protocol.fields import CHAT, COMPLETIONS
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.request import BusyError, FinishInfo
from medusa_export.engines.serving.text_service import Piece, TextRequest

JSON = {"content-type": "application/json", "host": "localhost"}
BODY = json.dumps({"model": "m", "prompt": "hi", "stream": True}).encode()


class StandInService:
    """Answers with what a test says, when it says so."""

    def __init__(self, **options: Any) -> None:
        self.options = ServingOptions(**options)
        self.scheduler = SimpleNamespace(decoder=SimpleNamespace(slots=2))
        self.submitted, self.may_submit = threading.Event(), threading.Event()
        self.may_submit.set()
        self.cancelled, self.says = threading.Event(), list[Piece]()
        self.error: Exception | None = None

    def submit(self, request: TextRequest, say: Callable[[Piece], None]) -> Any:
        self.submitted.set()
        assert self.may_submit.wait(30)
        if self.error is not None:
            raise self.error
        for piece in self.says:
            say(piece)
        return SimpleNamespace(cancel=self.cancelled.set, input_ids=[1, 2, 3])

    def token_bytes(self, token: int) -> bytes:
        return f"t{token}".encode()

    def token_text(self, token: int) -> str:
        return f"t{token}"


class Client:
    """The other end of a request: what it sends, and whether it has hung up."""

    def __init__(self, *parts: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for index, part in enumerate(parts):
            more = index + 1 < len(parts)
            self.messages.put_nowait({"type": "http.request", "body": part, "more_body": more})
        named = {**JSON, **(headers or {})}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in named.items() if value is not None]
        scope = {"type": "http", "method": method, "headers": raw, "asgi": {"spec_version": "2.3"}}
        self.request = Request(scope, self.messages.get)
        self.sent: list[dict[str, Any]] = []

    def hang_up(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    async def take(self, response: Any) -> None:
        async def send(message: dict[str, Any]) -> None:
            self.sent.append(message)

        await response({**self.request.scope}, self.messages.get, send)


def front(service: StandInService | None = None, **options: Any) -> OpenAIFront:
    made: Any = service or StandInService()
    return OpenAIFront(made, FrontOptions(**{"host": "127.0.0.1", "name": "m", **options}), PrometheusMeter("m"))


def test_keys() -> None:
    asking = front(api_key="sesame")
    for value in (
        "",
        "sesame",
        "Bearer",
        "Bearer ",
        "Bearer sesam",
        "Bearer sesame0",
        "Basic sesame",
        "Bearer s\xe9same",
    ):
        with pytest.raises(KeyRefusedError) as refused:
            asking.guard(Client(headers={"authorization": value}).request)
        assert "sesam" not in str(refused.value)
    for value in ("Bearer sesame", "bearer  sesame "):
        asking.guard(Client(headers={"authorization": value, "host": "any.example"}).request)


@pytest.mark.parametrize(
    ("bound", "host", "is_taken"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("::1", "[::1]:8000", True),
        ("127.0.0.5", "127.0.0.5", True),
        ("localhost", "evil.example", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "evil.example@127.0.0.1.x", False),
        ("127.0.0.1", "", False),
        ("0.0.0.0", "my.server", True),  # reached under names that only its users know
    ],
)
def test_hosts(bound: str, host: str, is_taken: bool) -> None:
    asked = Client(headers={"host": host}, method="GET").request
    if is_taken:
        front(host=bound).guard(asked)
    else:
        with pytest.raises(HostRefusedError):
            front(host=bound).guard(asked)


def test_media_types() -> None:
    for media in (
        "text/plain",
        "",
        "application/x-www-form-urlencoded",
        "application/jsonp",
        "text/plain; application/json",
    ):
        with pytest.raises(MediaTypeError):
            front().guard(Client(headers={"content-type": media}).request)
        front().guard(Client(headers={"content-type": media}, method="GET").request)
    front().guard(Client(headers={"content-type": "Application/JSON; charset=utf-8"}).request)


def ask(asked: OpenAIFront, client: Client) -> Any:
    return asked.answer(COMPLETIONS, TEXT_SHAPE, client.request)


def test_a_body_that_is_too_large_is_refused_and_counts_no_longer() -> None:
    small = front(StandInService(max_text_bytes=10))
    limit = small.bodies.limit
    for client, error in ((Client(b" " * limit, b" "), BodySizeError), (Client(b" " * limit), ConfigError)):
        with pytest.raises(error) as refused:
            asyncio.run(ask(small, client))
        assert type(refused.value) is error
    assert small.coming == 0
    assert not small.bodies.held


def test_requests_whose_bodies_do_not_come_keep_nobody_out() -> None:
    """One of a client's many streams is as slow as its client; none of them is refused for that, and others are served."""

    async def run() -> None:
        service = StandInService(max_queue=1)  # fewer than there are bodies under way
        service.says = [Piece("", [1], FinishInfo("stop", 1, 1, 0, 0.0))]
        asked, clients = front(service), [Client(BODY[:9], BODY[9:]) for _ in range(40)]
        rests = []
        for client in clients:
            first, rest = client.messages.get_nowait(), client.messages.get_nowait()
            client.messages.put_nowait(first)
            rests.append(rest)
        slow = [asyncio.ensure_future(ask(asked, client)) for client in clients]
        await asyncio.sleep(0.05)
        assert asked.coming == 0
        assert (await ask(asked, Client(BODY))).status_code == 200
        for client, rest, answer in zip(clients, rests, slow, strict=True):
            client.messages.put_nowait(rest)
            assert (await answer).status_code == 200

    asyncio.run(run())


def test_two_lengths_of_a_body_are_refused() -> None:
    with pytest.raises(FramingError):
        front().guard(Client(headers={"content-length": "2", "transfer-encoding": "chunked"}).request)


def test_requests_that_come_in_at_once_are_limited() -> None:
    async def run() -> None:
        service = StandInService(max_queue=1)
        service.says = [Piece("", [1], FinishInfo("stop", 1, 1, 0, 0.0))]
        service.may_submit.clear()
        asked = front(service)
        coming = [asyncio.ensure_future(ask(asked, Client(BODY))) for _ in range(3)]
        await asyncio.to_thread(service.submitted.wait, 30)
        with pytest.raises(BusyError):
            await ask(asked, Client(BODY))
        service.may_submit.set()
        assert [response.status_code for response in await asyncio.gather(*coming)] == [200] * 3

    asyncio.run(run())


def test_a_client_that_leaves_while_its_request_is_encoded() -> None:
    async def run() -> None:
        service, client = StandInService(), Client(BODY)
        service.may_submit.clear()
        asked = asyncio.ensure_future(ask(front(service), client))
        await asyncio.to_thread(service.submitted.wait, 30)
        client.hang_up()
        service.may_submit.set()
        with pytest.raises(ClientDisconnect):
            await asked
        assert service.cancelled.is_set()

    asyncio.run(run())


def test_an_interrupted_submission_is_cancelled_when_it_is_through() -> None:
    async def run() -> None:
        service = StandInService()
        service.may_submit.clear()
        asked = asyncio.ensure_future(ask(front(service), Client(BODY)))
        await asyncio.to_thread(service.submitted.wait, 30)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert not service.cancelled.is_set()
        service.may_submit.set()
        assert await asyncio.to_thread(service.cancelled.wait, 30)

    asyncio.run(run())


def test_a_client_that_is_gone_before_its_stream_begins() -> None:
    """The generator of the stream never runs then, so nothing in it could free the slot."""

    async def run() -> None:
        service, client = StandInService(), Client(BODY)
        service.says = [Piece("a", [1])]
        response = await ask(front(service), client)
        client.hang_up()
        await client.take(response)
        assert service.cancelled.is_set()
        assert b"[DONE]" not in b"".join(message.get("body", b"") for message in client.sent)

    asyncio.run(run())


def test_an_error_in_a_stream_is_its_last_event() -> None:
    async def run() -> None:
        service, client = StandInService(), Client(BODY)
        service.says = [Piece("a", [1]), Piece("", [], FinishInfo("timeout", 1, 1, 0, 0.0))]
        await client.take(await ask(front(service), client))
        text = b"".join(message.get("body", b"") for message in client.sent).decode()
        assert json.loads(text.split("data: ")[-1])["error"]["code"] == "timeout"
        assert "[DONE]" not in text

    asyncio.run(run())


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("reason", ["timeout", "closed", "error"])
def test_an_end_without_an_answer_has_a_status_while_nothing_is_sent(reason: str, streams: bool) -> None:
    service = StandInService()
    service.says = [Piece("", [], FinishInfo(reason, 1, 0, 0, 0.0))]
    body = json.dumps({"model": "m", "prompt": "hi", "stream": streams}).encode()
    with pytest.raises(UnfinishedError) as unfinished:
        asyncio.run(ask(front(service), Client(body)))
    assert unfinished.value.reason == reason


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"enable": 1, "tools_in": 2}}, ""),
        ({"chat_template_kwargs": {}}, ""),
    ],
)
def test_what_the_chat_template_would_read_is_refused(fields: dict[str, Any], where: str) -> None:
    """It gets messages alone; what it does not read changes nothing."""
    service: Any = StandInService()
    service.tokenizer = SimpleNamespace(chat_template="{% if enable_thinking %}{{ reasoning_effort }}{% endif %}")
    service.says = [Piece("", [1], FinishInfo("stop", 1, 1, 0, 0.0))]
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}).encode()
    asking = front(service).answer(CHAT, CHAT_SHAPE, Client(body).request)
    if where:
        with pytest.raises(UnsupportedError) as refused:
            asyncio.run(asking)
        assert refused.value.where == where
    else:
        assert asyncio.run(asking).status_code == 200


def test_errors_of_the_service_name_the_request_s_fields() -> None:
    for where, endpoint, shape, param in (("text", CHAT, CHAT_SHAPE, "messages"), ("stop", CHAT, CHAT_SHAPE, "stop"),
                                          ("/a/path chat template", CHAT, CHAT_SHAPE, "messages")):  # fmt: skip
        service = StandInService()
        service.error = ConfigError(where, "x", "y", "z")
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}]}).encode()
        with pytest.raises(ConfigError) as refused:
            asyncio.run(front(service).answer(endpoint, shape, Client(body).request))
        assert refused.value.where == param
