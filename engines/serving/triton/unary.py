"""The twin model for calls that take one response: it asks the streaming model, so that both share one engine."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from typing import Any

import numpy as np

from medusa_export.engines.serving.triton.guard import Guard
from medusa_export.engines.serving.triton.model import ANSWERED, ASKED_AT_ONCE, CANCEL, CODED, POLL_SECONDS, TWIN
from medusa_export.engines.serving.triton.sender import Rest, Sender
from medusa_export.engines.serving.triton.tensors import OUTPUTS, write_outputs

logger = logging.getLogger(__name__)


class UnaryModel:
    """Not decoupled, but not blocking either: a thread a request waits for the other model's answer."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read which model to ask; called once by Triton."""
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils
        config = json.loads(args["model_config"])
        self._model, self._is_batched = config["parameters"]["model"]["string_value"], int(config["max_batch_size"]) > 0
        self._rest = Rest()
        self._guard = Guard()

    def finalize(self) -> None:
        """Called once by Triton."""
        self._rest.clear()
        self._guard.close()

    def execute(self, requests: list[Any]) -> None:
        """Start a thread for each request and return: Triton takes the answers from their senders."""
        for request in requests:
            sender = Sender(self._pb, request.get_response_sender(), self._rest)
            threading.Thread(target=self._answer, args=(request, sender), daemon=True).start()

    def _answer(self, request: Any, sender: Sender) -> None:
        done = threading.Event()
        request_id = uuid.uuid4().hex
        threading.Thread(target=self._watch, args=(sender, request_id, done), daemon=True).start()
        try:
            self._ask(request, request_id, sender)
        except Exception:
            logger.exception("the other model could not be asked")
            sender.error("UNAVAILABLE", "the model does not answer")
        finally:
            done.set()

    def _ask(self, request: Any, request_id: str, sender: Sender) -> None:
        """Hand on the other model's whole answer, which comes as an error's message: see ANSWERED."""
        inputs = [tensor for tensor in request.inputs() if tensor.name() != "stream"]
        parameters = json.loads(request.parameters() or "{}")
        asked = self._request(inputs, request_id, {**parameters, TWIN: True})
        (answer,) = [answer for answer in asked.exec(decoupled=True) if answer.has_error()]
        code, mark, message = answer.error().message().partition(CODED)
        if code == ANSWERED:
            sender.tensors(write_outputs(json.loads(message), is_batched=self._is_batched), is_last=True)
        elif mark:
            sender.error(code, message)
        else:  # the server's own
            sender.error("INTERNAL", code)

    def _watch(self, sender: Sender, request_id: str, done: threading.Event) -> None:
        """Hand a cancellation on; the server does not do that for requests between models. Of many requests, each asks rarely."""
        while not done.wait(
            POLL_SECONDS * (1 + threading.active_count() // (2 * ASKED_AT_ONCE))
        ):  # two threads a request
            if sender.is_cancelled():
                empty = np.full((1, 1) if self._is_batched else (1,), b"", dtype=object)
                text = self._pb.Tensor("text_input", empty)  # it has to be there
                for _ in self._request([text], request_id, {CANCEL: request_id}).exec(decoupled=True):
                    pass
                return

    def _request(self, inputs: list[Any], request_id: str, parameters: dict[str, Any]) -> Any:
        names = [port.name for port in OUTPUTS]
        return self._pb.InferenceRequest(
            model_name=self._model, requested_output_names=names, inputs=inputs, request_id=request_id,
            parameters=parameters,
        )  # fmt: skip
