"""Completions of prompts as a configuration asks for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.inference.answer import Answer
from neox.inference.choosing import choose_all
from neox.inference.decoder import decode_all
from neox.inference.request import Progress, Request, no_room
from neox.inference.sampling import Sampling, prompt_seed
from neox.inference.stages import InferenceModel
from neox.tokenizer import Tokenizer

NOT_STARTED = "WARNING: text generation did not start; try different batching or adjust parameters"


class Step(NamedTuple):
    token: int
    logits_V: Tensor | None  # fp32, what the token was chosen from; on one rank only


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt the model sees: the text's tokens, or the end-of-document token when empty."""
    return tokenizer.tokenize(text) or [tokenizer.eod]


def request_of(config: NeoXConfig, prompt: Sequence[int], index: int) -> Request:
    """What the configuration asks for; `index` numbers the prompt, for its random numbers."""
    return Request(
        prompt=tuple(prompt),
        maximum_tokens=config.maximum_tokens,
        sampling=Sampling.of(config),
        seed=prompt_seed(config.seed, index),
        logits=config.return_logits,
    )


def continuation(
    model: InferenceModel,
    tokenizer: Tokenizer,
    config: NeoXConfig,
    prompt: Sequence[int],
    index: int,
) -> Iterator[Step]:
    """The tokens that follow one prompt, until the end of the document, which comes last.

    Raises CheckpointError when the model computes no numbers. Collective over the ranks of one
    replica: they iterate in step and see the same tokens, and may all stop early at the same one.
    """
    request = request_of(config, prompt, index)
    for _, progress in _progress(model, tokenizer, config, [request]):
        if progress.finish == "error":
            raise CheckpointError(progress.message)
        logits = [None] if progress.logits_TV is None else progress.logits_TV
        yield from map(Step, progress.tokens, logits)


def _progress(
    model: InferenceModel,
    tokenizer: Tokenizer,
    config: NeoXConfig,
    requests: Sequence[Request],
    begin: Callable[[int], object] = lambda number: None,
) -> Iterator[tuple[int, Progress]]:
    """As `decode_all`, with a cache or without."""
    if not config.recompute:
        yield from decode_all(model, tokenizer, requests, config.generate_batch_size, begin)
        return
    for number, request in enumerate(requests):
        begin(number)
        for progress in recomputed(model, tokenizer, request):
            yield number, progress


@torch.inference_mode()
def recomputed(model: InferenceModel, tokenizer: Tokenizer, request: Request) -> Iterator[Progress]:
    """Serve a request without a cache: run the whole sequence again for every token.

    Collective over the replica.
    """
    answer = Answer(0, request, tokenizer, model.config.seq_length)
    finish = None
    while finish is None:
        logits = model(torch.tensor([answer.tokens]), logits="last")
        [choice] = choose_all(model, tokenizer, [answer], logits)
        progress = answer.take(choice)
        finish = progress.finish
        yield progress


@dataclass
class _Completion:
    """A prompt and what has followed it so far."""

    context: str
    problem: str | None  # why nothing can
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logits: list[Tensor] = field(default_factory=list)
    finish: str | None = None
    message: str | None = None
    start: float = 0.0
    seconds: float = 0.0

    def begin(self) -> None:
        self.start = time.perf_counter()

    def take(self, progress: Progress) -> None:
        self.tokens += progress.tokens
        self.text += progress.text
        if progress.logits_TV is not None:
            self.logits.append(progress.logits_TV)
        self.finish, self.message = progress.finish, progress.message
        self.seconds = time.perf_counter() - self.start
        if self.finish == "stop":
            self.tokens.pop()  # the end of the document

    @property
    def there(self) -> bool:
        return self.problem is not None or self.finish is not None


def completions(
    model: InferenceModel,
    tokenizer: Tokenizer,
    config: NeoXConfig,
    contexts: Sequence[tuple[int, str]],
    advance: Callable[[int], object] = lambda tokens: None,
) -> Iterator[dict[str, Any]]:
    """Generate after the texts of (index, text), generate_batch_size at a time.

    Yields, in order and the same on every rank, the results that files hold:

    length: tokens generated, without the end-of-document token that sets `finished`.
    text: their text, as it stands behind the prompt's; None when there are none.
    message: None, or why the result is not what was asked for.
    duration_seconds: from when there was room for it beside others.
    logits: only with return_logits. maximum_tokens rows of the padded vocabulary's size: the fp32
    logits that each token was chosen from, zeros for tokens never generated.

    `advance` is told of tokens as they come, and in the end of those that never will: of
    maximum_tokens for each result. Raises CheckpointError in the place of a result whose logits
    were not finite numbers. Collective over the ranks of one replica.
    """
    everything, to_do, requests = [], [], []
    for index, context in contexts:
        prompt = encode(tokenizer, context)
        completion = _Completion(context, no_room(len(prompt), config.seq_length))
        everything.append(completion)
        if not completion.there:
            to_do.append(completion)
            requests.append(request_of(config, prompt, index))
    coming = _progress(model, tokenizer, config, requests, lambda number: to_do[number].begin())
    for completion in everything:
        while not completion.there:
            number, progress = next(coming)
            to_do[number].take(progress)
            advance(len(progress.tokens))
        if completion.finish == "error":
            raise CheckpointError(completion.message)
        advance(config.maximum_tokens - len(completion.tokens) - (completion.finish == "stop"))
        yield _result(model, config, completion)
        completion.logits.clear()


def _result(model: InferenceModel, config: NeoXConfig, completion: _Completion) -> dict[str, Any]:
    tokens = completion.tokens
    message = None
    if completion.problem is not None:
        message = f"WARNING: {completion.problem}"
    elif not tokens:
        message = NOT_STARTED
    result: dict[str, Any] = {
        "context": completion.context,
        "text": completion.text if tokens else None,
        "length": len(tokens),
        "finished": completion.finish == "stop",
        "message": message,
        "duration_seconds": completion.seconds,
    }
    if config.return_logits:
        # The rank that chose the tokens has them.
        logits_TV = torch.zeros(config.maximum_tokens, model.padded_vocab_size, device=model.device)
        if completion.logits:
            held_TV = torch.cat(completion.logits)
            logits_TV[: len(held_TV)] = held_TV
        result["logits"] = model.broadcast(logits_TV).tolist()
    return result
