"""The FastAPI application of the OpenAI front: its routes, and what errors look like."""

# Annotations of the routes are read when the application is made, and their types are imported there: no postponed evaluation.

import logging
from typing import Any

from medusa_export.core.errors import MedusaExportError, missing_package
from medusa_export.engines.serving.openai.answers import CHAT_SHAPE, TEXT_SHAPE
from medusa_export.engines.serving.openai.errors import (
    END_MESSAGES,
    INTERNAL,
    Refusal,
    UnknownModelError,
    body_of,
    error_body,
    refusal_of,
)
from medusa_export.engines.serving.openai.fields import CHAT, COMPLETIONS
from medusa_export.engines.serving.openai.front import OpenAIFront
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter

logger = logging.getLogger(__name__)


def build_app(front: OpenAIFront, meter: PrometheusMeter) -> Any:
    """The application.

    Raises:
        MissingPackageError: no fastapi.
    """
    try:
        from fastapi import APIRouter, Depends, FastAPI, Request, Response
        from fastapi.responses import JSONResponse
    except ImportError as error:
        raise missing_package("fastapi", "serve") from error

    def guard(request: Request) -> None:
        front.guard(request)

    app = FastAPI(title="medusa-serve", openapi_url=None, docs_url=None, redoc_url=None)
    guarded = APIRouter(dependencies=[Depends(guard)])

    @guarded.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await front.answer(CHAT, CHAT_SHAPE, request)

    @guarded.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await front.answer(COMPLETIONS, TEXT_SHAPE, request)

    @guarded.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(front.options.name)]})

    @guarded.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != front.options.name:
            raise UnknownModelError("model", repr(name[:64]), front.options.name, "see /v1/models")
        return JSONResponse(_model(name))

    @guarded.get("/metrics")
    async def metrics() -> Response:
        content, media_type = meter.render()
        return Response(content, media_type=media_type)

    @app.get("/health")
    async def health() -> Response:
        is_open = front.service.scheduler.is_open
        return JSONResponse({"status": "ok" if is_open else "stopping"}, 200 if is_open else 503)

    app.include_router(guarded)
    _handle_errors(app)
    return app


def _handle_errors(app: Any) -> None:
    """Every error in the protocol's words, without what is inside."""
    from fastapi import Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    @app.exception_handler(MedusaExportError)
    async def refused(_: Request, error: MedusaExportError) -> Response:
        refusal = refusal_of(error)
        if refusal is INTERNAL:
            logger.error("%s", error)
        return JSONResponse(body_of(error), refusal.status, dict(refusal.headers))

    @app.exception_handler(HTTPException)
    async def no_route(_: Request, error: HTTPException) -> Response:
        refusal = Refusal(
            error.status_code, "invalid_request_error", "not_found" if error.status_code == 404 else "not_allowed"
        )
        message = f"{error.detail}; there are /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics"
        return JSONResponse(error_body(refusal, message), refusal.status, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:  # the server logs it
        return JSONResponse(error_body(INTERNAL, END_MESSAGES["error"]), INTERNAL.status, dict(INTERNAL.headers))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "medusa-export"}
