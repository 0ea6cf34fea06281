"""The ASGI application."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fusion_edge.runtime.serve.chat import DEADLINE_HEADER, ChatCompletions, unknown_model
from fusion_edge.runtime.serve.engine import Engine
from fusion_edge.runtime.serve.errors import ApiError
from fusion_edge.runtime.serve.images.source import ImageSource
from fusion_edge.runtime.serve.middleware import middleware
from fusion_edge.runtime.serve.openapi import openapi
from fusion_edge.runtime.serve.pictures import Pictures
from fusion_edge.runtime.serve.service_responses import ModelInfo, ModelList, Status
from fusion_edge.runtime.serve.settings import ServeSettings

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def make_app(settings: ServeSettings) -> Starlette:
    """Return the application of a server.

    Its lifespan loads the bundle in the background, and frees it. ``app.state.engine`` is the :class:`.Engine` from the
    startup on. Every app has its own model, queue and metrics.
    """
    images = ImageSource(settings.safety.images)
    pictures = Pictures(images)
    chat = ChatCompletions(settings.model_name, pictures)
    service = _Service(settings, [images.close, pictures.close, chat.close])

    def count_crowded() -> None:
        app.state.engine.metrics.refused.labels("too_many_bytes").inc()

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{model:path}", service.model),
            Route("/health", service.health),
            Route("/ready", service.ready),
            Route("/metrics", service.metrics),
            Route("/openapi.json", service.document),
        ],
        middleware=middleware(settings.safety, count_crowded),
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _defect},
        lifespan=service.lifespan,
    )
    return app


class _Service:
    """The endpoints besides chat completions."""

    def __init__(self, settings: ServeSettings, close: Sequence[Callable[[], None]]) -> None:
        """``close`` is called at the end, one by one: each lets the threads of a part end."""
        self._settings = settings
        self._close = close
        self._document = JSONResponse(openapi(settings.model_name, DEADLINE_HEADER))
        self._model = ModelInfo(
            id=settings.model_name, object="model", created=int(time.time()), owned_by="fusion-edge"
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Load the model while the application runs, and free it at the end."""
        app.state.engine = engine = Engine(self._settings)
        try:
            yield
        finally:
            for close in self._close:
                close()
            await engine.close()

    async def models(self, request: Request) -> Response:
        return _response(ModelList(object="list", data=[self._model]))

    async def model(self, request: Request) -> Response:
        if (given := request.path_params["model"]) != self._model.id:
            raise unknown_model(given, self._model.id)
        return _response(self._model)

    async def health(self, request: Request) -> Response:
        state = request.app.state.engine.state
        return _response(Status(status=state), 503 if state == "failed" else 200)

    async def ready(self, request: Request) -> Response:
        state = request.app.state.engine.state
        return _response(Status(status=state), 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(request.app.state.engine.metrics.text(), media_type=METRICS_TYPE)

    async def document(self, request: Request) -> Response:
        return self._document


def _response(content: BaseModel, status: int = 200) -> Response:
    return Response(content.model_dump_json(), status, media_type="application/json")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    error.__traceback__ = None  # its frames have the request, and tasks that keep the error: a cycle
    return JSONResponse(error.body(), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer a path or a method that does not exist in OpenAI's form."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    remedy = "see /openapi.json"
    message = (
        f"{what[:200]} does not exist; {remedy}." if error.status_code == 404 else f"{what[:200]}: {error.detail}."
    )
    refused = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return JSONResponse(refused.body(), refused.status, refused.headers)


async def _defect(request: Request, error: Exception) -> Response:
    """Answer for an exception that is a defect of this server. Starlette raises it again, for the log."""
    return await _api_error(request, ApiError(500, "The server failed; see its messages."))
