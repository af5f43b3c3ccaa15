"""The part of the CUDA side that can be looked at without a GPU; its calls to CUDA go to stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from medusa_export.engines.tensorrt import device as tensorrt_device
from medusa_export.engines.tensorrt.device import CudaStream


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was asked of a stand-in for torch.cuda."""
    seen: list[Any] = []

    class StandInGraph:
        def replay(self) -> None:
            seen.append("replay")

    @contextmanager
    def capture(graph: StandInGraph, stream: object) -> Iterator[None]:
        seen.append(("capture", stream))
        yield
        seen.append("captured")

    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: seen.append(("current", stream)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronized"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandInGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    tensorrt_device.process_stream.cache_clear()
    yield seen
    tensorrt_device.process_stream.cache_clear()


def test_engines_share_a_stream(calls: list[Any]) -> None:
    """Two engines that are compared take turns on it; on streams of their own nothing would order them."""
    first, second = CudaStream(), CudaStream()
    assert first.stream is second.stream
    assert calls == [("current", first.stream)]


def test_a_capture_follows_a_run(calls: list[Any]) -> None:
    """What is compiled or allocated the first time may not be captured."""
    device = CudaStream()
    calls.clear()
    replay = device.capture(lambda: calls.append("work"))
    assert calls == ["work", "synchronized", ("capture", device.stream), "work", "captured"]
    replay()
    assert calls[-1] == "replay"
