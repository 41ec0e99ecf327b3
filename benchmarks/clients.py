"""Clients that ask a server for streamed completions, many at a time, and what they saw."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

TIMEOUT = 900.0  # seconds that an answer may take


@dataclass(frozen=True)
class Request:
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    first: float  # seconds to the first text
    latency: float  # seconds to the end


@dataclass(frozen=True)
class Turn:
    """What a server did with the requests of a round."""

    answers: list[Answer]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.tokens for answer in self.answers) / self.seconds

    def latency(self, share: float) -> float:
        return quantile([answer.latency for answer in self.answers], share)

    def first(self, share: float) -> float:
        return quantile([answer.first for answer in self.answers], share)


def quantile(values: Sequence[float], share: float) -> float:
    """The least of the values that as large a share of them is not above."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def complete(
    client: httpx.AsyncClient, address: str, model: str | None, request: Request
) -> Answer:
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, tokens, first = "", None, None
    started = time.perf_counter()
    async with client.stream("POST", f"{address}/v1/completions", json=body) as response:
        if response.status_code != 200:
            sys.exit(f"{address}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            for choice in event["choices"]:
                text += choice["text"]
            if text and first is None:
                first = time.perf_counter() - started
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
    latency = time.perf_counter() - started
    assert tokens is not None, f"{address} tells no usage"
    return Answer(text, tokens, latency if first is None else first, latency)


async def ask(address: str, model: str | None, requests: Sequence[Request], clients: int) -> Turn:
    """Have `clients` at a time ask for all. Ends the benchmark at an answer that is an error."""
    import httpx

    waiting = iter(enumerate(requests))
    answers: dict[int, Answer] = {}

    async def work(client: httpx.AsyncClient) -> None:
        for number, request in waiting:
            answers[number] = await complete(client, address, model, request)

    # A connection for each request: servers close what is idle, and a request may cross that.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(work(client) for _ in range(clients)))
        seconds = time.perf_counter() - started
    return Turn([answers[number] for number in range(len(requests))], seconds)
