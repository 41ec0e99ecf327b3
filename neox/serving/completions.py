"""POST /v1/completions and POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.responses import Response

from neox.inference.request import Progress, Request
from neox.serving import answers
from neox.serving.answers import EventStream
from neox.serving.engine import Run
from neox.serving.errors import BadRequest
from neox.serving.responses import failures, json_or_stream
from neox.serving.schemas import ChatCompletion, ChatRequest, Completion, CompletionRequest
from neox.serving.service import Prompt, Service

DEFAULT_MAX_TOKENS = 16  # OpenAI's, of /v1/completions


@dataclass(frozen=True)
class Piece:
    """What one step gave one choice, in OpenAI's terms."""

    index: int
    text: str
    tokens: int
    logprobs: dict[str, Any] | None
    finish: str | None


class Job:
    """One HTTP request: its sequences, and how its answer is written."""

    def __init__(self, service: Service, requests: list[Request], n: int, model: str) -> None:
        self.service = service
        self.requests = requests
        self.n = n
        self.model = model
        self.completion_tokens = 0

    @property
    def usage(self) -> dict[str, int]:
        return answers.usage(self.requests, self.n, self.completion_tokens)

    async def pieces(self, run: Run) -> AsyncIterator[Piece]:
        self.service.engine.metrics.prompt_tokens.inc(self.usage["prompt_tokens"])
        async for index, progress in run.progress():
            self.completion_tokens += len(progress.tokens)
            logprobs = self.logprobs(index, progress) if progress.logprobs else None
            yield Piece(index, progress.text, len(progress.tokens), logprobs, progress.finish)

    def logprobs(self, index: int, progress: Progress) -> dict[str, Any]:
        raise NotImplementedError

    async def choices(self) -> list[dict[str, Any]]:
        """Every choice, whole: text, logprobs and finish_reason."""
        texts = [""] * len(self.requests)
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self.requests]
        finish: list[str | None] = [None] * len(self.requests)
        async with self.service.engine.running(self.requests) as run:
            async for piece in self.pieces(run):
                texts[piece.index] += piece.text
                finish[piece.index] = piece.finish
                if piece.logprobs is not None:
                    logprobs[piece.index].append(piece.logprobs)
        return [
            {
                "index": index,
                "text": text,
                "logprobs": answers.join_logprobs(logprobs[index]),
                "finish_reason": finish[index],
            }
            for index, text in enumerate(texts)
        ]


class CompletionJob(Job):
    def __init__(self, service: Service, body: CompletionRequest, prompts: list[Prompt]) -> None:
        wanted = body.max_tokens or min(
            DEFAULT_MAX_TOKENS, *(service.room(prompt, None) for prompt in prompts)
        )
        model = service.model(body.model)
        requests = service.requests(prompts, body, wanted, body.logprobs)
        super().__init__(service, requests, body.n or 1, model)
        self.texts = _prompt_texts(service, body, prompts)
        self.echo = bool(body.echo)
        self.offsets = [
            answers.Offsets(service.tokenizer, request.prompt, len(self.texts[index // self.n]))
            for index, request in enumerate(requests)
        ]

    def logprobs(self, index: int, progress: Progress) -> dict[str, Any]:
        return answers.completion_logprobs(progress, self.service.tokenizer, self.offsets[index])

    async def whole(self) -> dict[str, Any]:
        choices = await self.choices()
        for choice in choices if self.echo else []:
            choice["text"] = self.texts[choice["index"] // self.n] + choice["text"]
        head = answers.envelope("cmpl", "text_completion", self.model)
        return {**head, "choices": choices, "usage": self.usage}

    async def stream(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        head = answers.envelope("cmpl", "text_completion", self.model)
        tail = {"usage": None} if include_usage else {}
        async with self.service.engine.running(self.requests) as run:
            yield b""
            for index in range(len(self.requests)) if self.echo else ():
                yield _completion_chunk(head, tail, index, self.texts[index // self.n])
            async for piece in self.pieces(run):
                if piece.text or piece.logprobs or piece.finish:
                    yield _completion_chunk(
                        head, tail, piece.index, piece.text, piece.logprobs, piece.finish
                    )
        if include_usage:
            yield answers.event({**head, "choices": [], "usage": self.usage})
        yield answers.DONE


class ChatJob(Job):
    def __init__(self, service: Service, body: ChatRequest, prompt: Prompt) -> None:
        wanted = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        model = service.model(body.model)
        requests = service.requests([prompt], body, wanted, logprobs, service.turn_ends)
        super().__init__(service, requests, body.n or 1, model)

    def logprobs(self, index: int, progress: Progress) -> dict[str, Any]:
        return answers.chat_logprobs(progress, self.service.tokenizer)

    async def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": choice["index"],
                "message": {"role": "assistant", "content": choice["text"], "refusal": None},
                "logprobs": choice["logprobs"],
                "finish_reason": choice["finish_reason"],
            }
            for choice in await self.choices()
        ]
        head = answers.envelope("chatcmpl", "chat.completion", self.model)
        return {**head, "choices": choices, "usage": self.usage}

    async def stream(self, include_usage: bool) -> AsyncGenerator[bytes, None]:
        head = answers.envelope("chatcmpl", "chat.completion.chunk", self.model)
        tail = {"usage": None} if include_usage else {}
        async with self.service.engine.running(self.requests) as run:
            for index in range(len(self.requests)):
                role = {"role": "assistant", "content": "", "refusal": None}
                yield _chat_chunk(head, tail, index, role)
            async for piece in self.pieces(run):
                if piece.text or piece.logprobs:
                    yield _chat_chunk(
                        head, tail, piece.index, {"content": piece.text}, piece.logprobs
                    )
                if piece.finish:
                    yield _chat_chunk(head, tail, piece.index, {}, None, piece.finish)
        if include_usage:
            yield answers.event({**head, "choices": [], "usage": self.usage})
        yield answers.DONE


def router(service: Service) -> APIRouter:
    """OpenAI's two endpoints."""
    routes = APIRouter()

    @routes.post(
        "/v1/completions",
        responses={**json_or_stream(Completion), **failures(400, 401, 404, 413, 500, 503, 504)},
    )
    async def create_completion(body: CompletionRequest) -> Response:
        """Continue a text, or several."""
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise BadRequest("best_of is not supported: only the value of n", "best_of")
        if body.echo and body.logprobs is not None:
            raise BadRequest("echo has no logprobs of the prompt: ask for one of the two", "echo")
        service.model(body.model)
        return await _answer(CompletionJob(service, body, await _prompts(service, body)), body)

    @routes.post(
        "/v1/chat/completions",
        responses={
            **json_or_stream(ChatCompletion), **failures(400, 401, 404, 413, 500, 503, 504)
        },
    )  # fmt: skip
    async def create_chat_completion(body: ChatRequest) -> Response:
        """Continue a conversation."""
        if body.top_logprobs is not None and not body.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        service.model(body.model)
        return await _answer(ChatJob(service, body, await service.chat_prompt(body.messages)), body)

    return routes


async def _answer(job: CompletionJob | ChatJob, body: CompletionRequest | ChatRequest) -> Response:
    if not body.stream:
        return JSONResponse(await job.whole())
    options = body.stream_options
    return EventStream(job.stream(bool(options and options.include_usage)))


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """OpenAI's four kinds of prompt, as tokens."""
    prompt: Any = body.prompt
    if isinstance(prompt, str):
        return await service.tokenize([prompt], "prompt")
    if isinstance(prompt[0], str):
        return await service.tokenize(prompt, "prompt")
    prompts = [tuple(prompt)] if isinstance(prompt[0], int) else [tuple(part) for part in prompt]
    for tokens in prompts:
        service.check_prompt(tokens, "prompt")
    return prompts


def _prompt_texts(service: Service, body: CompletionRequest, prompts: list[Prompt]) -> list[str]:
    prompt: Any = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], str):
        return prompt
    return [service.tokenizer.detokenize(tokens) for tokens in prompts]


def _completion_chunk(
    head: dict[str, Any],
    tail: dict[str, Any],
    index: int,
    text: str,
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> bytes:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
    return answers.event({**head, "choices": [choice], **tail})


def _chat_chunk(
    head: dict[str, Any],
    tail: dict[str, Any],
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish: str | None = None,
) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return answers.event({**head, "choices": [choice], **tail})
