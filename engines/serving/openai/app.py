"""The FastAPI application of the OpenAI front: its routes, and what errors look like."""

# Annotations of the routes are read when the application is made, and their types are imported there: no postponed evaluation.

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

from medusa_export.core.errors import ConfigError, MedusaExportError, missing_package
from medusa_export.engines.serving.openai.connections import REFUSED_SECONDS, Connections
from medusa_export.engines.serving.openai.front import OpenAIFront
from medusa_export.engines.serving.openai.protocol.answers import CHAT_SHAPE, TEXT_SHAPE
from medusa_export.engines.serving.openai.protocol.errors import (
    END_MESSAGES,
    INTERNAL,
    ConnectionsError,
    Refusal,
    body_of,
    error_body,
    refusal_of,
)
from medusa_export.engines.serving.openai.protocol.fields import CHAT, COMPLETIONS
from medusa_export.engines.serving.openai.protocol.tokenized import DETOKENIZE, to_encode, tokenize_endpoint
from medusa_export.engines.serving.openai.request_log import HEADER, RequestLog

PATHS = (
    "/v1/chat/completions, /v1/completions, /v1/models, /tokenize, /detokenize, /version, /health, /ready and /metrics"
)

logger = logging.getLogger(__name__)


def build_app(front: OpenAIFront) -> Any:
    """The application.

    Raises:
        MissingPackageError: no fastapi.
    """
    try:
        from fastapi import APIRouter, Depends, FastAPI, Request
        from starlette.middleware.cors import CORSMiddleware
    except ImportError as error:
        raise missing_package("fastapi", "serve") from error

    def guard(request: Request) -> None:
        front.guard(request)

    app = FastAPI(title="medusa-serve", openapi_url=None, docs_url=None, redoc_url=None)
    guarded = APIRouter(dependencies=[Depends(guard)])
    _add_answers(guarded, front)
    _add_tokens(guarded, front)
    _add_state(app, guarded, front)
    app.include_router(guarded)
    _handle_errors(app, front)
    if front.options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=front.options.cors_origins, allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=[HEADER],
        )  # fmt: skip
    return RequestLog(app)


def refusing_app(front: OpenAIFront, connections: Connections) -> Any:
    """The application for connections too many: it answers one request, whatever it is, and has the connection closed.

    Args:
        front: counts it.
        connections: what the answer names.
    """
    from starlette.responses import JSONResponse

    most, of_one = (limit or "any number" for limit in (connections.most, connections.most_per_client))
    error = ConnectionsError(
        "connection", "one too many", f"at most {most}, {of_one} of one address", "close some, or try again in a moment"
    )
    refusal, body = refusal_of(error), body_of(error)

    async def read(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        while (await receive()).get("more_body"):
            pass

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        with contextlib.suppress(asyncio.TimeoutError):  # behind its request, so that the client reads it
            await asyncio.wait_for(read(receive), REFUSED_SECONDS)
        front.meter.refused(refusal.code)
        await JSONResponse(body, refusal.status, dict(refusal.headers))(scope, receive, send)

    return RequestLog(refuse)


def _add_answers(guarded: Any, front: OpenAIFront) -> None:
    """What the model says, and which model that is."""
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse

    started = int(time.time())

    def described() -> dict[str, Any]:
        about = {"id": front.options.name, "object": "model", "created": started, "owned_by": "medusa-export"}
        return {**about, "root": front.options.name, "parent": None, "max_model_len": front.service.max_length}

    @guarded.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await front.answer(CHAT, CHAT_SHAPE, request)

    @guarded.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await front.answer(COMPLETIONS, TEXT_SHAPE, request)

    @guarded.get("/v1/models/")
    @guarded.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [described()]})

    @guarded.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        front.require_model(name)
        return JSONResponse(described())


def _add_tokens(guarded: Any, front: OpenAIFront) -> None:
    """Texts into tokens and back, as vLLM's server does it."""
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse

    @guarded.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await front.read_body(request)
        endpoint = tokenize_endpoint(body)
        values = front.read_values(endpoint, {"model": front.options.name, **body})
        try:
            tokens = await front.run(lambda: front.service.encode(to_encode(values)))
        except ConfigError as error:  # the service knows no fields
            error.where = endpoint.content
            raise
        told = {"count": len(tokens), "max_model_len": front.service.max_length, "tokens": tokens}
        if values.get("return_token_strs"):
            told["token_strs"] = [front.service.token_text(token) for token in tokens]
        return JSONResponse(told)

    @guarded.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await front.read_body(request)
        values = front.read_values(DETOKENIZE, {"model": front.options.name, **body})
        return JSONResponse({"prompt": await front.run(lambda: front.service.decode(values["tokens"]))})


def _add_state(app: Any, guarded: Any, front: OpenAIFront) -> None:
    """How the server is."""
    from fastapi import Response
    from fastapi.responses import JSONResponse

    @guarded.get("/metrics")
    async def metrics() -> Response:
        content, media_type = front.meter.render()
        return Response(content, media_type=media_type)

    @guarded.get("/version")
    async def told_version() -> Response:
        return JSONResponse({"version": version("medusa-export")})

    def state(is_well: bool) -> Response:
        return JSONResponse({"status": "ok" if is_well else "stopping"}, 200 if is_well else 503)

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return state(front.service.scheduler.is_open)

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        """Whether a request would be taken now: not while the server stops, nor while its queue is full."""
        scheduler = front.service.scheduler
        if scheduler.is_open and scheduler.waiting >= front.service.options.max_queue:
            return JSONResponse({"status": "busy"}, 503)
        return state(scheduler.is_open)


def _handle_errors(app: Any, front: OpenAIFront) -> None:
    """Every error in the protocol's words, without what is inside."""
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    def told(refusal: Refusal, body: dict[str, Any], headers: Mapping[str, str]) -> Response:
        front.meter.refused(refusal.code)
        return JSONResponse(body, refusal.status, dict(headers))

    @app.exception_handler(MedusaExportError)
    async def refused(_: Request, error: MedusaExportError) -> Response:
        refusal = refusal_of(error)
        if refusal is INTERNAL:
            logger.error("%s", error)
        else:
            logger.info("refused", extra={"code": refusal.code, "reason": str(error)})
        return told(refusal, body_of(error), refusal.headers)

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        code = "not_found" if error.status_code == 404 else "not_allowed"
        refusal = Refusal(error.status_code, "invalid_request_error", code)
        return told(refusal, error_body(refusal, f"{error.detail}; there are {PATHS}"), error.headers or {})

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:  # the server logs it, with the request's id
        return told(INTERNAL, error_body(INTERNAL, END_MESSAGES["error"]), INTERNAL.headers)
