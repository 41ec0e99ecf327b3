"""What goes wrong with a request, in OpenAI's words: a status and a body that its client knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from neox.errors import NeoXError

# A client that is turned away may come again after this many seconds.
RETRY_AFTER_S = 1


class ApiError(NeoXError):
    """An answer with status `status` and OpenAI's error body."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None
    headers: Mapping[str, str] = {}

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        return error_body(str(self), self.type, self.param, self.code)


def error_body(
    message: str, type: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """`{"error": ...}` as OpenAI writes it."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


class BadRequest(ApiError):
    """The request asks for what there is not."""


class UnknownModel(ApiError):
    """404: no model of that name."""

    status = 404
    code = "model_not_found"

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"there is no model {name[:64]!r}; there are: {', '.join(known)}", "model")


class WrongKey(ApiError):
    """401: no API key, or none of ours."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}

    def __init__(self) -> None:
        super().__init__("send an API key of this server as: Authorization: Bearer KEY")


class TooLarge(ApiError):
    """413: the body is larger than the server reads."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body has more than {limit} bytes (serve_max_body); send less")


class Overloaded(ApiError):
    """503: the queue is full."""

    status = 503
    type = "server_error"
    code = "queue_full"
    headers: Mapping[str, str] = {"Retry-After": str(RETRY_AFTER_S)}

    def __init__(self) -> None:
        super().__init__("queue full, try again later")


class Unavailable(ApiError):
    """503: the model is not there yet, or not any more."""

    status = 503
    type = "server_error"
    code = "unavailable"
    headers: Mapping[str, str] = {"Retry-After": str(RETRY_AFTER_S)}

    def __init__(self, state: str) -> None:
        super().__init__(
            {
                "loading": "the model is being loaded, try again later",
                "stopping": "the server is shutting down",
            }.get(state, "the model has failed; the server's console says why")
        )


class EngineFailed(ApiError):
    """500: decoding ended with an error."""

    status = 500
    type = "server_error"
    code = "engine_failed"

    def __init__(self, message: str = "decoding has failed; the server's console says why") -> None:
        super().__init__(message)


class TimedOut(ApiError):
    """504: not answered in time."""

    status = 504
    type = "server_error"
    code = "timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"not answered within {seconds:g} s (serve_request_timeout); ask for fewer tokens, or "
            "again later"
        )
