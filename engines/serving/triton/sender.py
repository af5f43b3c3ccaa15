"""A response sender of Triton's python backend, made safe: asking a finished one whether it is cancelled ends the whole server."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

REST_SECONDS = 5.0


class Rest:
    """Where finished senders stay for a while.

    Triton 2.51 answers is_cancelled() from a thread of its own, which wakes the caller and then touches the sender once more
    (PbCancel::ReportIsCancelled, read in its sources): one that is collected in between is written to after its memory has gone.
    """

    def __init__(self) -> None:
        self.senders: deque[tuple[float, Any]] = deque()
        self._lock = threading.Lock()

    def take(self, sender: Any) -> None:
        """One more; those that have rested go. From any thread."""
        now = time.monotonic()
        with self._lock:
            self.senders.append((now, sender))
            while now - self.senders[0][0] > REST_SECONDS:
                self.senders.popleft()

    def clear(self) -> None:
        """All go, as they have to before the model does."""
        self.senders.clear()


class Sender:
    """Answers one request.

    Triton's object is let go of a while after the last response: it lies in memory that is shared with the server, and one that
    outlives the model makes the stub end with a segmentation fault.

    Args:
        pb_utils: Triton's module.
        sender: the request's.
        rest: of the model.
    """

    def __init__(self, pb_utils: Any, sender: Any, rest: Rest) -> None:
        self._pb, self._sender, self._rest = pb_utils, sender, rest
        self._lock = threading.Lock()

    def is_cancelled(self) -> bool:
        """Whether the client has given up; False once the last response is sent. Costs a message to the server."""
        with self._lock:
            return self._sender is not None and bool(self._sender.is_cancelled())

    def tensors(self, arrays: Mapping[str, Any], *, is_last: bool) -> None:
        """Send a response."""
        tensors = [self._pb.Tensor(name, array) for name, array in arrays.items()]
        self.response(self._pb.InferenceResponse(output_tensors=tensors), is_last=is_last)

    def error(self, code: str, message: str) -> None:
        """Send an error, as the last response.

        Args:
            code: a name of Triton's: "INVALID_ARG", "UNAVAILABLE" ...
        """
        error = self._pb.TritonError(message, getattr(self._pb.TritonError, code))
        self.response(self._pb.InferenceResponse(error=error), is_last=True)

    def response(self, response: Any, *, is_last: bool) -> None:
        """Send Triton's own response object."""
        if not is_last:
            self._sender.send(response)
            return
        with self._lock:
            sender, self._sender = self._sender, None
            self._rest.take(sender)
            sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def nothing(self) -> None:
        """End without a response."""
        with self._lock:
            sender, self._sender = self._sender, None
            self._rest.take(sender)
            sender.send(flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
