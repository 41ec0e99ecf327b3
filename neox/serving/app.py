"""The application: endpoints, errors, the gate in front, and its OpenAPI schema."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

import neox
from neox.serving import completions, older
from neox.serving.errors import UnknownModel
from neox.serving.gate import OPEN, Gate
from neox.serving.metrics import CONTENT_TYPE
from neox.serving.page import FILES, HEADERS
from neox.serving.responses import add_error_handlers, failures
from neox.serving.schemas import Health, Model, Models
from neox.serving.service import Service


def build_app(
    service: Service,
    keys: Sequence[str] = (),
    max_body: int = 1 << 20,
    connections: int = 256,
    cors_origins: Sequence[str] = (),
) -> ASGIApp:
    """The whole ASGI application. `keys`: those that are let in, everybody without any."""
    app = FastAPI(
        title="neox",
        version=neox.__version__,
        docs_url=None,  # their pages fetch scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    add_error_handlers(app)
    app.include_router(completions.router(service))
    app.include_router(older.router(service))
    _add_models(app, service)
    _add_watching(app, service)
    _add_page(app)
    _correct_schema(app, bool(keys))
    gate: ASGIApp = Gate(app, service.engine.metrics, keys, max_body, connections)
    if not cors_origins:
        return gate
    return CORSMiddleware(
        gate, allow_origins=cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
    )


def _add_models(app: FastAPI, service: Service) -> None:
    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.created, "owned_by": "neox"}

    @app.get("/v1/models", response_model=Models, responses=failures(401, 503))
    async def list_models() -> Response:
        """The base model, and every adapter as a model."""
        return JSONResponse({"object": "list", "data": [describe(name) for name in service.models]})

    @app.get("/v1/models/{model:path}", response_model=Model, responses=failures(401, 404, 503))
    async def retrieve_model(model: str) -> Response:
        """One of them."""
        if model not in service.models:
            raise UnknownModel(model, service.models)
        return JSONResponse(describe(model))


def _add_watching(app: FastAPI, service: Service) -> None:
    @app.get(
        "/health",
        response_model=Health,
        responses={503: {"model": Health, "description": "Not ready: it says why."}},
    )
    async def health() -> Response:
        """Whether completions are answered."""
        state = service.engine.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get(
        "/metrics",
        responses={
            200: {
                "description": "In Prometheus's exposition format.",
                "content": {CONTENT_TYPE: {"schema": {"type": "string"}}},
            },
            **failures(401, 503),
        },
        response_class=Response,
    )
    async def metrics() -> Response:
        """Counts of requests and tokens, times, queue."""
        return Response(service.engine.metrics.text(), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    for path, (file, media_type) in FILES.items():
        answer = Response(file.read_bytes(), headers=HEADERS, media_type=media_type)
        app.add_api_route(path, _giving(answer), include_in_schema=False)


def _giving(answer: Response) -> Callable[[], Awaitable[Response]]:
    async def give() -> Response:
        return answer

    return give


def _correct_schema(app: FastAPI, keyed: bool) -> None:
    """Wrong requests get 400 here, not FastAPI's 422; without keys there is no 401."""
    schema = app.openapi()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if not keyed:
                operation["responses"].pop("401", None)
            elif path not in OPEN:
                operation["security"] = [{"key": []}]
    if keyed:
        schemes = {"key": {"type": "http", "scheme": "bearer"}}
        schema.setdefault("components", {})["securitySchemes"] = schemes
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
