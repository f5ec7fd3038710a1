"""The routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llava_edge.server import page
from llava_edge.server.chat import ChatCompletions
from llava_edge.server.errors import ApiError, as_api_error
from llava_edge.server.guard import Guard
from llava_edge.server.replies import models
from llava_edge.server.service import Service


def make_app(service: Service) -> Starlette:
    """The ASGI application of a service."""

    async def front(request: Request) -> Response:
        return page.response()

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        return JSONResponse({"status": "ready", "model": service.ready().model.name})

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.render(service.scheduler), media_type="text/plain; version=0.0.4")

    async def list_models(request: Request) -> Response:
        return JSONResponse(models(service.ready().model.name, service.started, service.describe()))

    async def one_model(request: Request) -> Response:
        (model,) = models(service.ready().model.name, service.started, service.describe())["data"]
        if request.path_params["name"] != model["id"]:
            raise ApiError(404, f"There is no such model here, only {model['id']!r}.", code="model_not_found")
        return JSONResponse(model)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    access = service.options.access
    middleware = [Middleware(Guard, access=access)]
    if access.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[
            Route("/", front),
            Route("/v1/chat/completions", ChatCompletions(service), methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
            Route("/ready", ready),
            Route("/metrics", metrics),
        ],
        middleware=middleware,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _defect},
        lifespan=lifespan,
    )


async def _api_error(request: Request, error: Exception) -> Response:
    known = as_api_error(error)
    return JSONResponse(known.body(), known.status, headers=known.headers())


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: "There is nothing at this address.", 405: "This address does not take this method."}
    known = ApiError(error.status_code, texts.get(error.status_code, "The request is wrong."))
    return JSONResponse(known.body(), known.status, headers=dict(error.headers or {}))


async def _defect(request: Request, error: Exception) -> Response:
    return JSONResponse(as_api_error(error).body(), 500)
