"""Our model behind lm-eval's LM interface: scores of texts, and texts.

Every rank of every replica calls the same methods with the same requests and gets the same answers.
A replica's ranks run each forward pass together; data-parallel replicas share out the requests.
Shape letters: B batch rows, S positions, V (padded) vocabulary, C positions of a continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from neox import log
from neox.errors import CheckpointError, ConfigError
from neox.inference.generate import generate
from neox.inference.sampling import Sampling, prompt_generator
from neox.inference.stages import InferenceModel
from neox.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]  # tokens of a context, tokens of what follows it


class NotFiniteError(CheckpointError):
    """The model computes NaN or infinity."""


class NeoXLM(LM):
    """lm-eval's view of one model.

    batch_size: rows of a forward pass; the scores do not depend on it.
    bar: counts the forward passes' rows; made by the caller, who may hide lm-eval's own bars.
    together: whether a NotFiniteError waits until every rank can raise it, for who goes on after
    it; otherwise the rank that finds a reason for it raises it at once.
    """

    def __init__(
        self,
        model: InferenceModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        bar: tqdm | None = None,
        together: bool = False,
    ) -> None:
        super().__init__()  # rank 0 of 1: each of our ranks shows lm-eval all requests
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.bar = log.progress(total=0, desc="evaluating") if bar is None else bar
        self.together = together
        self.max_length: int = model.config.seq_length

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Per (context, continuation): the continuation's log-probability, and is it greedy.

        Natural logarithm, summed over the continuation's tokens. Greedy: each of them is the
        likeliest after those before it. A context too long for seq_length loses its beginning.
        """
        return self._score([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-probability of each whole text, after an end-of-document token."""
        eod = self.tokenizer.eod
        pairs = [([eod], self.tokenizer.tokenize(request.args[0])) for request in requests]
        return [log_probability for log_probability, _ in self._score(pairs)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, up to the first stop string (left out).

        Each request carries lm-eval's generation_kwargs: until, max_gen_toks, do_sample,
        temperature, top_k, top_p. ConfigError for any other that changes the text.
        """
        groups = self.model.groups
        mine = range(groups.dp_rank, len(requests), groups.dp)
        self.bar.total += len(mine)
        texts = {}
        for i in mine:
            context, options = requests[i].args
            texts[i] = self._continue(context, options, index=i)
            self.bar.update()
        if groups.dp_group is not None:
            shares: list[dict[int, str]] = [{}] * groups.dp
            dist.all_gather_object(shares, texts, group=groups.dp_group)
            texts = {i: text for share in shares for i, text in share.items()}
        return [texts[i] for i in range(len(requests))]

    def encode_pair(self, context: str, continuation: str) -> Pair:
        """Tokens of the context, never none, and of what they are to be followed by.

        Both come from one tokenisation, split where the context's own tokens end. Spaces at the
        context's end belong to the continuation, as most vocabularies have words with a space in
        front. An empty context is an end-of-document token, which is what precedes a document.
        """
        eod = self.tokenizer.eod
        if not context:
            tokens = self.tokenizer.tokenize(continuation)
            return (tokens[:1], tokens[1:]) if tokens[:1] == [eod] else ([eod], tokens)
        text = context.rstrip()
        head = self.tokenizer.tokenize(text)
        tokens = self.tokenizer.tokenize(context + continuation)
        return (head, tokens[len(head) :]) if head else ([eod], tokens)

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-probability and greediness of every pair's continuation. Collective, see above.

        A continuation longer than seq_length is scored piece by piece, each token once and with
        as much before its piece as fits.
        """
        pieces: list[Pair] = []
        owners: list[int] = []
        for i, (context, continuation) in enumerate(pairs):
            for start in range(0, len(continuation), self.max_length):
                piece = continuation[start : start + self.max_length]
                pieces.append((context + continuation[:start], piece))
                owners.append(i)
        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for i, (total, likeliest) in zip(owners, self._score_pieces(pieces), strict=True):
            totals[i] += total
            greedy[i] &= likeliest == 1
        return list(zip(totals, greedy, strict=True))

    def _score_pieces(self, pairs: Sequence[Pair]) -> list[list[float]]:
        """[log-probability, 1 if greedy] of every pair; no continuation is empty or too long.

        Pairs with the same input (context and continuation without its last token) share one row:
        less work, and equal answers get exactly equal scores. The longest rows come first, so a
        batch too big for the memory fails at once.
        """
        askers: dict[tuple[int, ...], list[int]] = {}
        for i, (context, continuation) in enumerate(pairs):
            seen = (context + continuation)[-(self.max_length + 1) : -1]
            askers.setdefault(tuple(seen), []).append(i)
        groups = self.model.groups
        rows = sorted(askers, key=len, reverse=True)[groups.dp_rank :: groups.dp]
        self.bar.total += len(rows)

        # A pair belongs to one replica, the others leave zeros: the sum over replicas is exact.
        scores = torch.zeros(len(pairs), 2, dtype=torch.float64)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            logits_BSV = self.model(_pad_right(batch, self.model.device))
            if logits_BSV is not None:
                for row, logits_SV in zip(batch, logits_BSV, strict=True):
                    for i in askers[row]:
                        scores[i] = _score_tail(logits_SV[: len(row)], pairs[i][1])
                        if not self.together:
                            _check_finite(scores[i])
            self.bar.update(len(batch))
        scores = self.model.broadcast(scores.to(self.model.device))
        if groups.dp_group is not None:
            dist.all_reduce(scores, group=groups.dp_group)
        _check_finite(scores)
        return scores.tolist()

    def _continue(self, context: str, options: dict[str, Any], index: int) -> str:
        """The text after `context`; `index` numbers the request, for its random stream."""
        until, limit, sampling = generation_options(options, self.max_length)
        eod = self.tokenizer.eod
        prompt = self.tokenizer.tokenize(context)[-(self.max_length - limit) :] or [eod]
        text = ""
        tokens: list[int] = []
        for token, _ in generate(
            self.model,
            prompt,
            maximum_tokens=limit,
            sampling=sampling,
            generator=prompt_generator(self.seed, index),
            eod=eod,
        ):
            # Rows that only pad the vocabulary stand for no text.
            if token != eod and token < self.tokenizer.vocab_size:
                tokens.append(token)
                text = self.tokenizer.detokenize(tokens)
            if any(stop in text for stop in until):
                break
        for stop in until:
            text = text.split(stop)[0]
        return text


def _pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [B, S]. A causal model sees nothing to the right of a token, so any padding will do."""
    tokens_BS = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for tokens_S, row in zip(tokens_BS, rows, strict=True):
        tokens_S[: len(row)] = torch.tensor(row)
    return tokens_BS.to(device)


def _score_tail(logits_SV: Tensor, continuation: list[int]) -> Tensor:
    """[log-probability, 1 if greedy], float64, on the CPU.

    The last C rows of the logits predict the C tokens of the continuation. The softmax runs over
    the padded vocabulary, as it did in training and does in an exported model.
    """
    tokens_C = torch.tensor(continuation, device=logits_SV.device)
    log_probabilities_CV = logits_SV[-len(continuation) :].float().log_softmax(dim=-1)
    total = log_probabilities_CV.gather(1, tokens_C[:, None]).sum()
    greedy = (log_probabilities_CV.argmax(dim=-1) == tokens_C).all()
    return torch.stack([total.double(), greedy.double()]).cpu()


def _check_finite(scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise NotFiniteError(
            "the model's logits are not finite numbers: the checkpoint is damaged, or its "
            "activations overflow this precision; try `precision: fp32`"
        )


def generation_options(options: dict[str, Any], seq_length: int) -> tuple[list[str], int, Sampling]:
    """Stop strings, the number of tokens at most, and how to choose them. ConfigError."""
    options = dict(normalize_gen_kwargs(options))
    until = [stop for stop in options.pop("until") if stop]
    limit = options.pop("max_gen_toks")
    temperature = options.pop("temperature", 0.0)
    top_k, top_p = options.pop("top_k", 0) or 0, options.pop("top_p", 0.0) or 0.0
    if options.pop("do_sample"):
        sampling = Sampling(temperature or 1.0, top_k, top_p)
    else:
        sampling = Sampling()
    # num_beams: 1 and the like only spell out a default.
    unknown = {name: value for name, value in options.items() if value not in (None, False, 1)}
    if unknown:
        raise ConfigError(
            f"the task's generation_kwargs ask for {unknown}; known here are until, max_gen_toks, "
            "do_sample, temperature, top_k and top_p"
        )
    if limit >= seq_length:
        raise ConfigError(
            f"max_gen_toks is {limit}, which leaves no room for a prompt within the model's "
            f"seq_length of {seq_length}"
        )
    return until, limit, sampling
