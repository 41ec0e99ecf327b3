"""What a model is asked to write, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from neox.errors import RequestError
from neox.inference.sampling import GREEDY, Sampling

# Why an answer ended: `stop` at a token that ends it or before a stop string, `length` at
# maximum_tokens or where nothing more fits, `error` because its logits are not finite numbers.
Finish = Literal["stop", "length", "cancelled", "error"]

LARGEST_PENALTY = 100.0  # a float32 logit times it is still a number


@dataclass(frozen=True)
class Request:
    """What to write after a prompt.

    prompt: tokens, at least one.
    maximum_tokens: fewer come where the model's context ends (finish `length`).
    minimum_tokens: until there are so many, no token that ends the answer is chosen, and stop
        strings are not looked for.
    ends: tokens that end the answer as the end of the document does: that of a turn, say.
    stop: strings; the text ends before the first of them, the one that is complete first.
    logprobs: None for none; n >= 0 for each token's own log-probability and the n likeliest.
    seed: of the random numbers; the k-th token takes the k-th, whatever else runs.
    ignore_eod: no token that ends the answer is ever chosen.
    adapter: name of a LoRA adapter that the model was loaded with.
    logits: hand out the logits that each token was chosen from.
    """

    prompt: tuple[int, ...]
    maximum_tokens: int
    minimum_tokens: int = 0
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    seed: int = 0
    ends: tuple[int, ...] = ()
    ignore_eod: bool = False
    adapter: str | None = None
    logits: bool = False


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities, before penalties and temperature.

    The softmax is over the padded vocabulary, as in training; `likeliest` are of the tokenizer's
    tokens, the likeliest first, and need not include `token`.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Progress:
    """What one step gave one request.

    tokens: that were chosen. The one that ended the answer is the last of them, and so are those
        of a stop string.
    text: what is new and will stay: never half a character, nothing of a stop string. All texts
        of an answer make its text, as it stands behind the prompt's: it may begin with a space.
    logprobs: one for each of `tokens`, if asked for.
    message: what is wrong, and what to do, with the finish `error`.
    logits_TV: float32, for each of `tokens`, over the padded vocabulary, if asked for; on the rank
        that chooses the tokens (InferenceModel.is_source) only.
    """

    id: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    message: str | None = None
    logits_TV: Tensor | None = None


def no_room(tokens: int, max_length: int) -> str | None:
    """Why nothing can follow a prompt of so many tokens; None when there is room."""
    if tokens < max_length:
        return None
    return (
        f"the prompt has {tokens} tokens, and the model's seq_length of {max_length} "
        f"leaves no room to generate; shorten it to at most {max_length - 1} tokens"
    )


def check(request: Request, vocabulary: int, max_length: int) -> None:
    """Raise RequestError for what cannot be served. `vocabulary` is the tokenizer's size."""
    for problem in _problems(request, vocabulary, max_length):
        raise RequestError(problem)


def _problems(request: Request, vocabulary: int, max_length: int) -> Iterator[str]:
    sampling, most = request.sampling, request.maximum_tokens
    if not request.prompt:
        yield "the prompt is empty: it needs one token at least"
    for token in request.prompt:
        if not 0 <= token < vocabulary:
            yield f"the prompt holds the token {token}, but tokens are 0 to {vocabulary - 1}"
    for token in request.ends:
        if not 0 <= token < vocabulary:
            yield f"the token {token} is to end the answer, but tokens are 0 to {vocabulary - 1}"
    full = no_room(len(request.prompt), max_length)
    if full is not None:
        yield full
    if most < 1:
        yield f"maximum_tokens is {most}: set 1 or more"
    if not 0 <= request.minimum_tokens <= most:
        yield f"minimum_tokens is {request.minimum_tokens}: set 0 to maximum_tokens, {most}"
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        yield f"temperature is {sampling.temperature}: set a number of 0 or more"
    if sampling.top_k < 0:
        yield f"top_k is {sampling.top_k}: set 0, for all, or more"
    if not 0 <= sampling.top_p <= 1:
        yield f"top_p is {sampling.top_p}: set 0 to 1"
    if not 1 / LARGEST_PENALTY <= sampling.repetition_penalty <= LARGEST_PENALTY:
        yield (
            f"repetition_penalty is {sampling.repetition_penalty}: set a number from "
            f"{1 / LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}; 1 does nothing"
        )
    if "" in request.stop:
        yield "a stop string is empty: leave it out"
    if not 0 <= (request.logprobs or 0) <= vocabulary:
        yield f"logprobs is {request.logprobs}: set 0 to {vocabulary}, the number of tokens"
