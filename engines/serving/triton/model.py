"""The model that Triton's python backend loads: requests of the server into the scheduler, pieces of text back."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import fields
from heapq import nsmallest
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.request import BusyError, ClosedError, FinishInfo, RequestHandle
from medusa_export.engines.serving.text_service import Piece, TextRequest, TextService
from medusa_export.engines.serving.triton.dialect import read_inputs, settle
from medusa_export.engines.serving.triton.guard import Guard
from medusa_export.engines.serving.triton.metrics import TritonMeter
from medusa_export.engines.serving.triton.sender import Rest, Sender
from medusa_export.engines.serving.triton.tensors import INPUTS, write_outputs
from medusa_export.heads.decoding.sampling import Sampling

POLL_SECONDS = 0.02  # a step takes longer
ASKED_AT_ONCE = 16  # clients, whether they are still there
CANCEL = "medusa_cancel"  # parameter of a request that ends another one, by its id
TWIN = "medusa_twin"  # parameter of the twin's requests: errors between models lose their code, so it is put before the message
CODED = " | "
# Instead of a code: the message is the answer, as JSON. The stub of Triton 2.51 makes numpy arrays of a response's tensors without
# holding Python's lock (InferRequest::Exec), and with several requests at once that ends it; of an error it reads a string alone.
ANSWERED = "ANSWERED"
SAMPLING = {item.name for item in fields(Sampling)}  # of which the dialect has most, under the same names
ERRORS = {  # how a request can end without an answer: Triton's code, and what the client reads
    "cancelled": ("CANCELLED", "the request was cancelled"),
    "timeout": ("UNAVAILABLE", "the request took longer than its time limit"),
    "closed": ("UNAVAILABLE", "the server is stopping"),
    "error": ("INTERNAL", "the engine failed at this request"),
}

logger = logging.getLogger(__name__)


class RefusedRequest(Exception):  # noqa: N818 - what the server's log calls it
    """A request was refused; its client knows."""


class MedusaModel:
    """Decoupled: each request is answered through its response sender, from the scheduler's thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine in the model's directory; called once by Triton."""
        import triton_python_backend_utils as pb_utils

        self._pb = pb_utils
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        engine = Path(args["model_repository"]) / args["model_version"] / parameters.pop("engine")
        self.is_batched = int(config["max_batch_size"]) > 0
        self._meter = TritonMeter(pb_utils, args["model_name"])
        self._service = TextService(engine, ServingOptions.from_text(parameters), self._meter)
        self._open: dict[int, _Open] = {}
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._rest = Rest()
        self._watcher = threading.Thread(target=self._watch, name="medusa-export-cancel", daemon=True)
        self._watcher.start()
        self._guard = Guard(self._stop)

    def execute(self, requests: list[Any]) -> None:
        """Queue requests and return: the answers come later.

        Raises:
            RefusedRequest: some were refused. Their clients have been told why; this is how Triton counts them as failures
                (nv_inference_request_failure). Without dynamic batching there is one request at a time.
        """
        refused = [
            self._take(request, Sender(self._pb, request.get_response_sender(), self._rest)) for request in requests
        ]
        if any(refused):
            raise RefusedRequest(", ".join(filter(None, refused))) from None

    def finalize(self) -> None:
        """Finish what is being answered, for a while; called once by Triton."""
        self._service.close(drain=True, timeout_s=self._service.options.grace_s)
        self._stopping.set()
        self._watcher.join()
        self._rest.clear()
        self._meter.close()
        self._guard.close()

    def _stop(self) -> None:
        """The server has been told to end. Who waits hears of it in time: what Triton itself does is to hang up."""
        arguments = {"drain": True, "timeout_s": self._service.options.grace_s}
        threading.Thread(target=self._service.close, kwargs=arguments, name="medusa-export-stop", daemon=True).start()

    def _take(self, request: Any, sender: Sender) -> str:
        """Queue a request. Returns the code of an error if it was refused."""
        parameters = json.loads(request.parameters() or "{}")
        if CANCEL in parameters:
            self._cancel(str(parameters[CANCEL]), sender)
            return ""
        answer = _Open(self, sender, request.request_id(), is_coded=bool(parameters.pop(TWIN, False)))
        try:
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            values = settle(read_inputs(arrays, INPUTS, parameters), self._service.end_ids)
            answer.streams = bool(values.get("stream", False))
            answer.wants_logprobs = bool(values.get("return_log_probs", False))
            with self._lock:
                self._open[id(answer)] = answer  # before the first piece can come
            answer.handle = self._service.submit(self._request(values), answer.say)
        except MedusaExportError as error:
            self.forget(answer)
            code = "UNAVAILABLE" if isinstance(error, (BusyError, ClosedError)) else "INVALID_ARG"
            self._meter.refused(code)
            answer.fail(code, str(error))
            return code
        except Exception:
            self.forget(answer)
            logger.exception("a request could not be read")
            answer.fail("INTERNAL", "the server failed to read this request")
            return "INTERNAL"
        return ""

    def _request(self, values: dict[str, Any]) -> TextRequest:
        text = values["text_input"]
        if not text.strip():
            raise ConfigError("text", "nothing", "a question or a text to go on from", "add one")
        given = {
            "max_tokens": self._service.options.max_tokens,
            **{name: values[name] for name in SAMPLING & values.keys()},
        }
        sampling = Sampling(**given, logprobs=0 if values.get("return_log_probs") else None)
        system = [{"role": "system", "content": values["system"]}] if values.get("system") else []
        messages = [*system, {"role": "user", "content": text}] if values.get("chat", True) else ()
        prompt = "" if messages else text
        return TextRequest(messages, prompt, sampling, tuple(values["stop"]), values.get("timeout_s"))

    def _cancel(self, request_id: str, sender: Sender) -> None:
        """End the request with an id, for the twin, whose clients' cancellations do not reach this model."""
        with self._lock:
            handles = [answer.handle for answer in self._open.values() if answer.request_id == request_id]
        for handle in handles:
            if handle is not None:
                handle.cancel()
        sender.nothing()

    def _watch(self) -> None:
        """Cancel what clients have given up. Asking costs a message to the server, so those come first whose turn is longest ago."""
        turn = 0
        while not self._stopping.wait(POLL_SECONDS):
            turn += 1
            with self._lock:
                answers = nsmallest(ASKED_AT_ONCE, self._open.values(), key=lambda answer: answer.turn)
            for answer in answers:
                answer.turn = turn
                if answer.handle is not None and answer.sender.is_cancelled():
                    answer.handle.cancel()

    def forget(self, answer: _Open) -> None:
        """An answer is complete."""
        with self._lock:
            self._open.pop(id(answer), None)


class _Open:
    """One request that is being answered."""

    def __init__(self, model: MedusaModel, sender: Sender, request_id: str, *, is_coded: bool) -> None:
        self.sender, self.request_id, self._is_coded = sender, request_id, is_coded
        self.streams = False
        self.turn = 0  # when it was last asked whether its client has gone
        self.handle: RequestHandle | None = None
        self._model = model
        self._text, self._token_ids = "", list[int]()  # not sent yet
        self._logprobs = list[float]()
        self._told_logprob = 0.0  # their sum so far
        self.wants_logprobs = False

    def say(self, piece: Piece) -> None:
        """In the scheduler's thread."""
        self._text += piece.text
        self._token_ids += piece.token_ids
        self._logprobs += [item.logprob for item in piece.logprobs]
        if piece.end is not None:
            self._finish(piece.end)
        elif self.streams:
            self._send("", None)

    def fail(self, code: str, message: str) -> None:
        """Answer with an error, as the last thing."""
        self.sender.error(code, f"{code}{CODED}{message}" if self._is_coded else message)

    def _finish(self, end: FinishInfo) -> None:
        self._model.forget(self)
        if end.reason in ERRORS:
            self.fail(*ERRORS[end.reason])
        else:
            self._send(end.reason, end)

    def _send(self, reason: str, end: FinishInfo | None) -> None:
        values = {
            "text_output": self._text, "token_ids": self._token_ids, "finish_reason": reason,
            "prompt_tokens": end.prompt_tokens if end else 0, "completion_tokens": end.completion_tokens if end else 0,
            "tokens_per_step": end.tokens_per_step if end else 0.0,
        }  # fmt: skip
        if self.wants_logprobs:
            self._told_logprob += sum(self._logprobs)
            values |= {"cum_log_probs": self._told_logprob, "output_log_probs": self._logprobs}
        self._text, self._token_ids, self._logprobs = "", [], []
        if self._is_coded:  # always whole
            self.sender.error("UNKNOWN", f"{ANSWERED}{CODED}{json.dumps(values)}")
        else:
            self.sender.tensors(write_outputs(values, is_batched=self._model.is_batched), is_last=end is not None)
