"""Answers to what goes wrong, and how the OpenAPI schema tells of them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from neox.errors import RequestError
from neox.serving.errors import ApiError, BadRequest, EngineFailed
from neox.serving.schemas import NOT_SUPPORTED, UNKNOWN, ErrorBody, PlainErrorBody

_MEANINGS = {
    400: "The request is wrong; the message says what.",
    401: "No API key, or none of this server's.",
    404: "There is no such model.",
    413: "The body is too large.",
    500: "Decoding failed.",
    503: "The queue is full, or the model is not there (yet).",
    504: "Not answered in time.",
}
_OTHERS = {
    400: "the body is not JSON",
    404: "there is no such address",
    405: "this address takes another method",
}
_BRANCHES = ("str", "int", "float", "bool")  # pydantic's names
_PLAIN = ("/complete",)  # whose errors are {"error": text}, as they were before


def failures(*statuses: int, plain: bool = False) -> dict[int | str, dict[str, Any]]:
    """What an endpoint may answer besides a result, for its `responses`."""
    body = PlainErrorBody if plain else ErrorBody
    return {status: {"model": body, "description": _MEANINGS[status]} for status in statuses}


def json_or_stream(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """A 200 that is `model`, or with `stream: true` a stream of its chunks."""
    data = {"type": "string", "description": "A chunk as JSON, an error, or at the end [DONE]."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    stream = {"text/event-stream": {"itemSchema": event}}
    return {200: {"model": model, "description": "The answer.", "content": stream}}


def error_response(error: ApiError, path: str) -> JSONResponse:
    """An error's answer, in the words of the API that `path` belongs to."""
    body = {"error": str(error)} if path in _PLAIN else error.body
    return JSONResponse(body, error.status, dict(error.headers))


def add_error_handlers(app: FastAPI) -> None:
    """Every error of every endpoint in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error_response(error, request.url.path)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return error_response(BadRequest(str(error)), request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_explain(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = _OTHERS.get(error.status_code, str(error.detail))
        return error_response(_Other(message, error), request.url.path)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        """Its traceback goes to the console."""
        return error_response(EngineFailed("internal error"), request.url.path)


class _Other(ApiError):
    """What FastAPI itself answers."""

    def __init__(self, message: str, error: HTTPException) -> None:
        super().__init__(message)
        self.status = error.status_code
        self.headers = error.headers or {}


def _explain(error: RequestValidationError) -> BadRequest:
    """One of the reasons: of the branches of a union, the one that got farthest."""
    problem = max(
        error.errors(),
        key=lambda problem: (len(_place(problem)), not problem["type"].endswith("_type")),
    )
    if problem["type"] == "json_invalid":
        return BadRequest("the body is not JSON")
    names = [str(part) for part in _place(problem) if _is_name(part)]
    param = names[0] if names else None
    if param in NOT_SUPPORTED:
        return BadRequest(NOT_SUPPORTED[param], param)
    if problem["type"] == UNKNOWN:
        return BadRequest(f"there is no parameter {'.'.join(names) or 'of such a name'}", param)
    if param is None:
        return BadRequest("the body is not a JSON object, with Content-Type: application/json")
    return BadRequest(f"{'.'.join(names)}: {problem['msg']}", param)


def _place(problem: dict[str, Any]) -> tuple[Any, ...]:
    """The path to what is wrong, in the body."""
    unknown = (problem["ctx"]["name"],) if problem["type"] == UNKNOWN else ()
    return (*problem["loc"][1:], *unknown)


def _is_name(part: object) -> bool:
    """Whether a part of a location is a key or an index, not a branch of a union.

    A key is the client's, and must not make a message that is long or cannot be encoded.
    """
    if isinstance(part, int):
        return True
    text = str(part)
    return text not in _BRANCHES and text.replace("_", "").isalnum() and len(text) <= 64
