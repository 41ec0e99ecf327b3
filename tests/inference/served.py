"""Runs a decoder and gathers what it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neox.inference.decoder import Decoder
from neox.inference.request import Progress, Request, TokenLogprobs


@dataclass
class Served:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finish: str | None = None
    message: str | None = None

    def add(self, progress: Progress) -> None:
        assert self.finish is None, "nothing comes after the end"
        self.tokens += progress.tokens
        self.text += progress.text
        self.logprobs += progress.logprobs
        if progress.logits_TV is not None:
            self.logits.append(progress.logits_TV)
        self.finish, self.message = progress.finish, progress.message


def serve(
    decoder: Decoder, requests: Sequence[Request], later: Mapping[int, Request] | None = None
) -> list[Served]:
    """Submit the requests, and `later` ones before the steps of these numbers; run to the end."""
    later = dict(later or {})
    ids = [decoder.submit(request) for request in requests]
    found = {id: Served() for id in ids}
    step = 0
    while later or not decoder.idle:
        if step in later:
            found[decoder.submit(later.pop(step))] = Served()
        told = decoder.step()
        assert len({progress.id for progress in told}) == len(told)
        for progress in told:
            found[progress.id].add(progress)
        step += 1
        assert step < 1000
    assert (decoder.running, decoder.waiting) == (0, 0)
    return [found[id] for id in sorted(found)]


def logits_of(served: Served) -> Tensor:
    return torch.cat(served.logits)
