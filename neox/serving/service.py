"""What the endpoints have in common: the served models, and requests made of bodies."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from neox.errors import DataError
from neox.inference.request import Request
from neox.inference.sampling import Sampling
from neox.serving.engine import Engine
from neox.serving.errors import BadRequest, UnknownModel
from neox.serving.schemas import Generation, Message
from neox.tokenizer import Tokenizer
from neox.tokenizer.chat import ChatTemplate

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """In tokens."""

    context: int  # of prompt and answer together
    prompt: int
    answer: int
    complete: int  # what POST /complete writes


@dataclass(frozen=True)
class Service:
    """A model, its adapters and its engine. `created` is in seconds since the epoch."""

    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    name: str
    adapters: tuple[str, ...]
    limits: Limits
    created: int
    legacy_double_json: bool = False
    seeds: secrets.SystemRandom = field(default_factory=secrets.SystemRandom)

    @property
    def models(self) -> list[str]:
        return [self.name, *self.adapters]

    def model(self, name: str | None) -> str:
        """The model that a request means. Raises UnknownModel."""
        if name is None:
            return self.name
        if name not in self.models:
            raise UnknownModel(name, self.models)
        return name

    @property
    def turn_ends(self) -> tuple[int, ...]:
        """The token that ends a turn; that of a document does in any case."""
        eos = None if self.template is None else self.template.eos
        return () if eos is None or eos >= self.tokenizer.vocab_size else (eos,)

    async def tokenize(self, texts: Sequence[str], param: str) -> list[Prompt]:
        """The tokens of prompts; an empty one is the end-of-document token. Not on the event loop:
        a body's worth of text takes a while."""
        return await asyncio.to_thread(lambda: [self._tokens(text, param) for text in texts])

    def _tokens(self, text: str, param: str) -> Prompt:
        tokens = self.tokenizer.tokenize(text) or [self.tokenizer.eod]
        self.check_prompt(tokens, param)
        return tuple(tokens)

    async def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """A conversation's tokens, up to where the answer begins. Raises BadRequest."""
        if self.template is None:
            raise BadRequest(
                "this model has no chat template: start the server with chat_template_path, the "
                "folder of a chat model's tokenizer, or use /v1/completions",
                "messages",
            )
        turns = [_turn(message) for message in messages]
        template = self.template

        def write() -> Prompt:
            tokens = template.tokenize(template.write(turns, next_speaks=True))
            self.check_prompt(tokens, "messages")
            return tuple(tokens)

        try:
            return await asyncio.to_thread(write)
        except DataError as error:
            raise BadRequest(str(error), "messages") from None

    def check_prompt(self, tokens: Sequence[int], param: str) -> None:
        """Raise BadRequest for a prompt that is too long or holds no tokens of ours."""
        count, most = len(tokens), self.limits.prompt
        if count > most:
            error = BadRequest(f"the prompt has {count} tokens, and may have {most}", param)
            error.code = "context_length_exceeded"
            raise error
        strange = [token for token in tokens if token >= self.tokenizer.vocab_size]
        if strange:
            raise BadRequest(
                f"there is no token {strange[0]}: they are 0 to {self.tokenizer.vocab_size - 1}",
                param,
            )

    def requests(
        self,
        prompts: Sequence[Prompt],
        body: Generation,
        maximum_tokens: int | None,
        logprobs: int | None,
        ends: tuple[int, ...] = (),
    ) -> list[Request]:
        """n for each prompt, in order; `maximum_tokens` None is as many as there is room for.

        ends: tokens that end an answer besides that of a document.
        """
        n = body.n or 1
        if len(prompts) * n > self.engine.capacity:
            raise BadRequest(
                f"{len(prompts)} prompts times n {n} are {len(prompts) * n} sequences, and the "
                f"server takes {self.engine.capacity} at a time (serve_rows + serve_queue)",
                "n",
            )
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        # Without a seed any will do; choices of one prompt differ in any case.
        seed = self.seeds.getrandbits(63) if body.seed is None else body.seed
        adapter = self.model(body.model)
        return [
            Request(
                prompt=prompt,
                maximum_tokens=maximum,
                minimum_tokens=self._minimum(body.min_tokens or 0, maximum),
                sampling=sampling_of(body),
                stop=stop,
                ends=ends,
                logprobs=logprobs,
                seed=seed + choice,
                adapter=None if adapter == self.name else adapter,
            )
            for prompt in prompts
            for maximum in [self.room(prompt, maximum_tokens)]
            for choice in range(n)
        ]

    def room(self, prompt: Prompt, wanted: int | None, param: str = "max_tokens") -> int:
        """The tokens that may follow `prompt`. Raises BadRequest when they are too many."""
        room = min(self.limits.context - len(prompt), self.limits.answer)
        if wanted is None:
            return room
        if wanted > room:
            raise BadRequest(
                f"{wanted} tokens are asked for behind {len(prompt)} of the prompt; there is room "
                f"for {room}",
                param,
            )
        return wanted

    def _minimum(self, wanted: int, maximum: int) -> int:
        if wanted > maximum:
            raise BadRequest(
                f"min_tokens ({wanted}) is more than max_tokens ({maximum})", "min_tokens"
            )
        return wanted


def sampling_of(body: Generation) -> Sampling:
    """OpenAI's defaults are 1, ours are 0; a top_p of 0 leaves the likeliest token only."""
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    penalty = body.repetition_penalty or 1.0
    if temperature == 0 or top_p == 0:
        return Sampling(repetition_penalty=penalty)
    return Sampling(temperature, body.top_k or 0, top_p, penalty)


def _turn(message: Message) -> dict[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    turn = {"role": message.role, "content": text}
    return turn if message.name is None else {**turn, "name": message.name}
