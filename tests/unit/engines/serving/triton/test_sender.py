"""Senders of Triton's python backend, by a stand-in: what is sent last, and how long Triton's object lives."""

from __future__ import annotations

import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from medusa_export.engines.serving.triton import sender as sender_module
from medusa_export.engines.serving.triton.sender import REST_SECONDS, Rest, Sender


class Tritons:
    """What a request has."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, Any]] = []
        self.asked = 0

    def send(self, response: Any = None, flags: Any = None) -> None:
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        self.asked += 1
        return True


PB = SimpleNamespace(TRITONSERVER_RESPONSE_COMPLETE_FINAL="final")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is."""
    now = [100.0]
    monkeypatch.setattr(sender_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def finish(rest: Rest, way: str = "response") -> weakref.ref[Tritons]:
    theirs = Tritons()
    sender = Sender(PB, theirs, rest)
    if way == "response":
        sender.response("text", is_last=False)
        sender.response("end", is_last=True)
        assert theirs.sent == [("text", None), ("end", "final")]
    else:
        sender.nothing()
        assert theirs.sent == [(None, "final")]
    assert not sender.is_cancelled()
    assert not theirs.asked, "asking a finished one ends the server"
    return weakref.ref(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["response", "nothing"])
def test_a_finished_sender_rests_before_it_goes(way: str, clock: list[float]) -> None:
    rest = Rest()
    first = finish(rest, way)
    clock[0] += REST_SECONDS
    second = finish(rest)
    gc.collect()
    assert first() is not None, "Triton's thread may still touch it"
    clock[0] += 0.1
    third = finish(rest)
    gc.collect()
    assert first() is None
    assert second() is not None
    rest.clear()
    gc.collect()
    assert second() is third() is None, "one that outlives the model ends the stub"


def test_many_threads_finish_at_once() -> None:
    rest = Rest()
    threads = [threading.Thread(target=lambda: [rest.take(object()) for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rest.senders) == 4000
