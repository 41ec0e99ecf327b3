"""A request that is being served: its tokens, its text, and whether it has ended."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neox.inference.detokenize import StreamingDetokenizer
from neox.inference.request import Finish, Progress, Request, TokenLogprobs
from neox.inference.stop import StopStrings
from neox.tokenizer import Tokenizer


class Choice(NamedTuple):
    """A token that was chosen. `token` is None where the logits are not finite numbers."""

    token: int | None
    logprobs: TokenLogprobs | None
    logits_V: Tensor | None  # float32, if asked for; on the rank that chose only


class Answer:
    """tokens: of the prompt and behind it. generator: of this answer's random numbers.

    ends: the tokens that end it.
    """

    def __init__(self, id: int, request: Request, tokenizer: Tokenizer, max_length: int) -> None:
        self.id = id
        self.request = request
        self.tokens = list(request.prompt)
        # A Python number of any size is a seed. On the CPU it means the same for every device.
        self.generator = torch.Generator().manual_seed(request.seed % 2**64)
        self.ends = sorted({tokenizer.eod, *request.ends})
        self._most = min(request.maximum_tokens, max_length - len(request.prompt))
        self._detokenizer = StreamingDetokenizer(tokenizer, request.prompt)
        self._stops = StopStrings(request.stop)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def may_end(self) -> bool:
        """Whether one of `ends` may be chosen next."""
        request = self.request
        return not request.ignore_eod and self.generated >= request.minimum_tokens

    def take(self, choice: Choice) -> Progress:
        """Go on by a token. The progress says when that was the last."""
        if choice.token is None:
            message = self._not_finite()
            return Progress(self.id, text=self._rest(), finish="error", message=message)
        self.tokens.append(choice.token)
        text, finish = self._read(choice.token)
        logits_TV = None if choice.logits_V is None else choice.logits_V[None]
        logprobs = () if choice.logprobs is None else (choice.logprobs,)
        return Progress(self.id, (choice.token,), text, logprobs, finish, logits_TV=logits_TV)

    def cancel(self) -> Progress:
        return Progress(self.id, text=self._rest(), finish="cancelled")

    def _read(self, token: int) -> tuple[str, Finish | None]:
        """The text that a token makes certain, and whether it ends the answer."""
        if token in self.ends:
            return self._rest(), "stop"
        text = self._detokenizer.push(token)
        if self.generated >= self.request.minimum_tokens:
            text, stopped = self._stops.push(text)
            if stopped:
                return text, "stop"
        if self.generated == self._most:
            return text + self._rest(), "length"
        return text, None

    def _rest(self) -> str:
        """What was held back, of characters and of stop strings."""
        text, stopped = self._stops.push(self._detokenizer.flush())
        return text if stopped else text + self._stops.flush()

    def _not_finite(self) -> str:
        return (
            f"the model's logits after {len(self.tokens)} tokens are not finite numbers: the "
            "checkpoint is damaged, or its activations overflow this precision; try "
            "`precision: fp32`"
        )
