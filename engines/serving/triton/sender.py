"""A response sender of Triton's python backend, made safe: asking a finished one whether it is cancelled ends the whole server."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any


class Sender:
    """Answers one request.

    Triton's object is let go of with the last response: it lies in memory that is shared with the server, and one that outlives the
    model makes the stub end with a segmentation fault.

    Args:
        pb_utils: Triton's module.
        sender: the request's.
    """

    def __init__(self, pb_utils: Any, sender: Any) -> None:
        self._pb, self._sender = pb_utils, sender
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
            sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def nothing(self) -> None:
        """End without a response."""
        with self._lock:
            sender, self._sender = self._sender, None
            sender.send(flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
