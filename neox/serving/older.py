"""Two APIs that programs were written for before there was OpenAI's: /prompt/ and /complete."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from neox.inference.request import Request
from neox.inference.sampling import Sampling
from neox.serving.errors import BadRequest
from neox.serving.responses import failures
from neox.serving.schemas import CompleteAnswer, CompleteRequest, PromptAnswer, PromptRequest
from neox.serving.service import Service

_MOST_TOKENS = 1 << 31


def router(service: Service) -> APIRouter:
    """POST /prompt/ and POST /complete."""
    routes = APIRouter()
    errors = (400, 401, 413, 500, 503, 504)
    shape: Any = str if service.legacy_double_json else PromptAnswer

    @routes.post("/prompt", include_in_schema=False)
    @routes.post("/prompt/", response_model=shape, responses=failures(*errors))
    async def prompt(body: PromptRequest) -> Response:
        """Prompt and completion, of `length` tokens together."""
        temperature = _number(body.temperature, "temperature", 0.0, 100.0)
        length = int(_number(body.length, "length", 1, _MOST_TOKENS))
        (tokens,) = await service.tokenize([body.input], "input")
        if length <= len(tokens):
            raise BadRequest(
                f"length ({length}) counts the prompt's tokens too, which are {len(tokens)}: ask "
                "for more",
                "length",
            )
        count = service.room(tokens, length - len(tokens), "length")
        request = Request(
            tokens, count, minimum_tokens=count, sampling=Sampling(temperature), seed=_seed(service)
        )
        answer = {"output": body.input + await _text(service, request)}
        return JSONResponse(json.dumps(answer) if service.legacy_double_json else answer)

    @routes.post(
        "/complete", response_model=CompleteAnswer, responses=failures(*errors, plain=True)
    )
    async def complete(body: CompleteRequest) -> Response:
        """What follows `context`: at most as many tokens as the server's maximum_tokens."""
        (tokens,) = await service.tokenize([body.context], "context")
        count = min(service.limits.complete, service.room(tokens, None))
        greedy = body.temp == 0 or body.top_p == 0
        sampling = Sampling() if greedy else Sampling(body.temp, 0, body.top_p)
        request = Request(tokens, count, sampling=sampling, seed=_seed(service))
        return JSONResponse({"completion": await _text(service, request)})

    return routes


async def _text(service: Service, request: Request) -> str:
    metrics = service.engine.metrics
    text = ""
    async with service.engine.running([request]) as run:
        metrics.prompt_tokens.inc(len(request.prompt))
        async for _, progress in run.progress():
            text += progress.text
    return text


def _seed(service: Service) -> int:
    return service.seeds.getrandbits(63)


def _number(value: str | float, param: str, low: float, high: float) -> float:
    """A number, or text that is one."""
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:  # NaN is not, either
        raise BadRequest(f"{param} must be a number from {low:g} to {high:g}", param)
    return number
