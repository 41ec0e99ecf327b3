"""OpenAI's shapes for what an engine gives: log-probabilities, usage, the chunks of a stream."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from neox.inference.detokenize import REPLACEMENT, StreamingDetokenizer
from neox.inference.request import Progress, Request
from neox.serving.errors import ApiError
from neox.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
_UNLIKELY = -9999.0  # OpenAI's minus infinity, which JSON does not have


class Offsets:
    """Where each token's text begins, in characters."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], start: int) -> None:
        """start: characters of the prompt's text."""
        self._detokenizer = StreamingDetokenizer(tokenizer, prompt)
        self._at = start

    def push(self, token: int) -> int:
        """The tokens that make one character together have its place."""
        here = self._at
        self._at += len(self._detokenizer.push(token))
        return here


def completion_logprobs(progress: Progress, tokenizer: Tokenizer, offsets: Offsets) -> dict:
    """Of /v1/completions. Tokens that have the same text share an entry of top_logprobs."""
    shape: dict[str, list] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    for entry in progress.logprobs:
        text = tokenizer.detokenize([entry.token])
        # The likeliest last: of several tokens with one text it stays.
        top = {tokenizer.detokenize([t]): _finite(p) for t, p in reversed(entry.likeliest)}
        top.setdefault(text, _finite(entry.logprob))
        shape["tokens"].append(text)
        shape["token_logprobs"].append(_finite(entry.logprob))
        shape["top_logprobs"].append(dict(sorted(top.items(), key=lambda item: -item[1])))
        shape["text_offset"].append(offsets.push(entry.token))
    return shape


def chat_logprobs(progress: Progress, tokenizer: Tokenizer) -> dict[str, Any]:
    """Of /v1/chat/completions."""
    content = [
        {
            **_with_bytes(entry.token, entry.logprob, tokenizer),
            "top_logprobs": [_with_bytes(t, p, tokenizer) for t, p in entry.likeliest],
        }
        for entry in progress.logprobs
    ]
    return {"content": content, "refusal": None}


def join_logprobs(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Those of a whole answer; None when there are none."""
    if not parts:
        return None
    joined = dict(parts[0])
    for name, first in parts[0].items():
        if isinstance(first, list):
            joined[name] = [entry for part in parts for entry in part[name]]
    return joined


def usage(requests: list[Request], n: int, completion_tokens: int) -> dict[str, int]:
    """A prompt counts once, however many choices it has."""
    prompt_tokens = sum(len(request.prompt) for request in requests[::n])
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def envelope(prefix: str, object: str, model: str) -> dict[str, Any]:
    """What an answer, and every chunk of it, begins with."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": object,
        "created": int(time.time()),
        "model": model,
    }


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"


class EventStream(Response):
    """Server-sent events as they come; `events` is closed however the answer ends.

    Its first item comes before the status is sent, so that what it raises is an answer of its own.
    What is raised later becomes an event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            chunk = await anext(events)
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await _send(send, chunk)
            try:
                async for chunk in events:
                    await _send(send, chunk)
            except ApiError as error:
                await _send(send, event(error.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, chunk: bytes) -> None:
    if chunk:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


def _with_bytes(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    text = tokenizer.detokenize([token])
    encoded = None if REPLACEMENT in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": encoded}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _UNLIKELY
