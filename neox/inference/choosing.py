"""The next tokens of several answers, chosen on one rank and told to the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neox.inference.answer import Answer, Choice
from neox.inference.request import TokenLogprobs
from neox.inference.sampling import choose, penalize
from neox.inference.stages import InferenceModel
from neox.tokenizer import Tokenizer

_NONE = -1.0  # in place of a token


def choose_all(
    model: InferenceModel, tokenizer: Tokenizer, answers: Sequence[Answer], logits: Tensor | None
) -> list[Choice]:
    """The next token of each answer, the same on every rank of the replica.

    logits: [B, 1, V], B answers, of the padded vocabulary on the last stage; None elsewhere. Rows
    that pad the vocabulary stand for no token and are never chosen. Collective over the replica.
    """
    # One message of float64 numbers, in which ids are exact: for each answer the token, its
    # log-probability, and the likeliest ones with theirs.
    most = max(answer.request.logprobs or 0 for answer in answers)
    told_BX = torch.zeros(len(answers), 2 + 2 * most, dtype=torch.float64)
    if model.is_source:
        assert logits is not None
        logits_BV = logits[:, 0]
        tokens = _choose(answers, logits_BV, tokenizer)
        told_BX[:, 0] = torch.tensor([_NONE if token is None else token for token in tokens])
        _fill_logprobs(told_BX, answers, logits_BV, tokenizer.vocab_size)
    told = model.broadcast(told_BX.to(model.device)).tolist()
    choices = []
    for i, (answer, (token, logprob, *likeliest)) in enumerate(zip(answers, told, strict=True)):
        if token == _NONE:
            choices.append(Choice(None, None, None))
            continue
        logprobs = None
        asked = answer.request.logprobs
        if asked is not None:
            pairs = list(zip(map(int, likeliest[::2]), likeliest[1::2], strict=True))
            logprobs = TokenLogprobs(int(token), logprob, tuple(pairs[:asked]))
        logits_V = logits[i, 0] if answer.request.logits and model.is_source else None
        choices.append(Choice(int(token), logprobs, logits_V))
    return choices


def _choose(answers: Sequence[Answer], logits_BV: Tensor, tokenizer: Tokenizer) -> list[int | None]:
    finite = logits_BV.sum(dim=-1).isfinite().tolist()  # one pass: what is no number stays none
    logits_BV = logits_BV[:, : tokenizer.vocab_size]
    likeliest = logits_BV.argmax(dim=-1).tolist()
    tokens: list[int | None] = []
    for i, answer in enumerate(answers):
        sampling = answer.request.sampling
        if not finite[i]:
            tokens.append(None)
            continue
        allowed = answer.may_end or likeliest[i] not in answer.ends
        if sampling.is_greedy and sampling.repetition_penalty == 1 and allowed:
            tokens.append(likeliest[i])
            continue
        logits_V = logits_BV[i]
        if sampling.repetition_penalty != 1:
            logits_V = penalize(logits_V, answer.tokens, sampling.repetition_penalty)
        if not answer.may_end:
            ends = torch.tensor(answer.ends, device=logits_V.device)
            logits_V = logits_V.index_fill(0, ends, -torch.inf)
        tokens.append(choose(logits_V, sampling, answer.generator))
    return tokens


def _fill_logprobs(
    told_BX: Tensor, answers: Sequence[Answer], logits_BV: Tensor, vocabulary: int
) -> None:
    for i, answer in enumerate(answers):
        asked = answer.request.logprobs
        if asked is None or told_BX[i, 0] == _NONE:
            continue
        logprobs_V = logits_BV[i].log_softmax(dim=-1)
        told_BX[i, 1] = logprobs_V[int(told_BX[i, 0])]
        if asked:
            values, ids = logprobs_V[:vocabulary].topk(asked)
            told_BX[i, 2 : 2 + 2 * asked : 2] = ids
            told_BX[i, 3 : 3 + 2 * asked : 2] = values
