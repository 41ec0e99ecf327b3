"""Our model behind lm-eval's LM interface: scores of texts, and texts.

Every rank of every replica calls the same methods with the same requests and gets the same answers.
A replica's ranks run each forward pass together; data-parallel replicas share out the requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from neox import log
from neox.engine.memory import keep_freed_memory
from neox.errors import ConfigError
from neox.evaluation.answers import Answers, digest
from neox.evaluation.scoring import NotFiniteError, Pair, Scorer
from neox.inference.decoder import decode_all
from neox.inference.request import Request
from neox.inference.sampling import Sampling, prompt_seed
from neox.inference.stages import InferenceModel
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer
from neox.tokenizer.chat import ChatTemplate

AUTOMATIC_ROWS = 16  # texts that are written at the same time when no batch size is given


class NeoXLM(LM):
    """lm-eval's view of one model.

    load: makes the model when it is first needed; collective over the replica's ranks. A run whose
        answers are all known does without it.
    batch_size: inputs of a forward pass, None for as many as are fast; scores do not depend on it.
    bar: counts the inputs; made by the caller, who may hide lm-eval's own bars.
    answers: what is known from earlier runs, and takes what this one finds out.
    together: whether a NotFiniteError waits until every rank can raise it, for who goes on after
        it; otherwise the rank that finds a reason for it raises it at once.
    """

    def __init__(
        self,
        load: Callable[[], InferenceModel],
        tokenizer: Tokenizer,
        groups: ProcessGroups,
        max_length: int,
        *,
        batch_size: int | None,
        seed: int,
        chat: ChatTemplate | None = None,
        bar: tqdm | None = None,
        answers: Answers | None = None,
        together: bool = False,
    ) -> None:
        super().__init__()  # rank 0 of 1: each of our ranks shows lm-eval all requests
        self.tokenizer = tokenizer
        self.groups = groups
        self.max_length = max_length
        self.batch_size = batch_size
        self.seed = seed
        self.chat = chat
        self.bar = log.progress(total=0, desc="evaluating") if bar is None else bar
        self.together = together
        # Requests so far, the different ones that were computed, and those that earlier runs knew.
        self.asked = self.computed = self.remembered = 0
        self._load = load
        self._answers = answers or Answers(None)

    @cached_property
    def model(self) -> InferenceModel:
        model = self._load()
        if model.device.type == "cpu":
            keep_freed_memory()
        return model

    @cached_property
    def _known(self) -> dict[str, Any]:
        """Answers of earlier runs, on every rank. Collective over the world."""
        return self.groups.gather(self._answers.read() if self.groups.rank == 0 else {})[0]

    @cached_property
    def _earlier(self) -> frozenset[str]:
        """The keys that earlier runs answered."""
        return frozenset(self._known)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Per (context, continuation): the continuation's log-probability, and is it greedy.

        Natural logarithm, summed over the continuation's tokens. Greedy: each of them is the
        likeliest after those before it. A context too long for seq_length loses its beginning.
        """
        keys = [digest(["loglikelihood", *request.args]) for request in requests]

        def compute(new: Sequence[int]) -> list[Any]:
            pairs = [self.encode_pair(*requests[i].args) for i in new]
            return self._score(pairs, [keys[i] for i in new])

        return [(score, greedy) for score, greedy in self._answer(keys, compute)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-probability of each whole text, after an end-of-document token."""
        eod = self.tokenizer.eod
        keys = [digest(["loglikelihood_rolling", request.args[0]]) for request in requests]

        def compute(new: Sequence[int]) -> list[Any]:
            pairs = [([eod], self.tokenizer.tokenize(requests[i].args[0])) for i in new]
            return self._score(pairs, [keys[i] for i in new])

        return [score for score, _ in self._answer(keys, compute)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model writes after each context, up to the first stop string (left out).

        Each request carries lm-eval's generation_kwargs: until, max_gen_toks, do_sample,
        temperature, top_k, top_p. ConfigError for any other that changes the text.
        """
        keys = []
        for i, request in enumerate(requests):
            context, options = request.args
            drawn = [self.seed, i] if options.get("do_sample") else []
            keys.append(digest(["generate_until", context, options, *drawn]))

        def compute(new: Sequence[int]) -> list[str]:
            mine = new[self.groups.dp_rank :: self.groups.dp]
            self.bar.total += len(mine)
            texts = self._from_replicas(self._write(mine, requests, keys))
            wrong = [text for text in texts.values() if isinstance(text, NotFiniteError)]
            if wrong:
                raise wrong[0]
            return [text for _, text in sorted(texts.items())]

        return self._answer(keys, compute)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the text that a prompt begins with. DataError."""
        if self.chat is None:
            raise ConfigError(
                "a chat template is asked for and there is none: set chat_template_path to the "
                "folder of a chat model's tokenizer"
            )
        return self.chat.prompt(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's own text, which lm-eval records."""
        return self.chat.source if self.chat is not None else ""

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps prompts apart by, should it keep any."""
        return self.chat.folder if self.chat is not None else self.tokenizer.name

    def _answer(self, keys: Sequence[str], compute: Callable[[list[int]], list[Any]]) -> list[Any]:
        """The answer of each key: known, or by `compute`, which gets the indices of the others.

        A question that is asked twice is computed once. Collective over the world.
        """
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key not in self._known:
                first.setdefault(key, i)
        new = list(first.values())
        self.asked += len(keys)
        self.remembered += sum(key in self._earlier for key in keys)
        self.computed += len(new)
        if new:
            self._known.update(zip((keys[i] for i in new), compute(new), strict=True))
        return [self._known[key] for key in keys]

    @property
    def _speaks(self) -> bool:
        """Whether this rank writes down what its replica finds out."""
        return self.groups.is_last_stage and self.groups.tp_rank == 0

    def _from_replicas(self, share: dict[int, Any]) -> dict[int, Any]:
        """What all replicas found. Collective over the dp group."""
        if self.groups.dp_group is None:
            return share
        shares: list[dict[int, Any]] = [{}] * self.groups.dp
        dist.all_gather_object(shares, share, group=self.groups.dp_group)
        return {i: value for share in shares for i, value in share.items()}

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

    def _score(self, pairs: Sequence[Pair], keys: Sequence[str]) -> list[tuple[float, bool]]:
        """Log-probability and greediness of every pair's continuation. Collective, see above.

        A continuation longer than seq_length is scored piece by piece, each token once and with
        as much before its piece as fits. Answers are written down under `keys`, one for each pair.
        """
        pieces: list[Pair] = []
        owners: list[int] = []
        for i, (context, continuation) in enumerate(pairs):
            for start in range(0, len(continuation), self.max_length):
                piece = continuation[start : start + self.max_length]
                pieces.append((context + continuation[:start], piece))
                owners.append(i)
        whole = [0 < len(continuation) <= self.max_length for _, continuation in pairs]

        def write(done: Sequence[int], scores: Sequence[Sequence[float]]) -> None:
            found = zip(done, scores, strict=True)
            self._answers.keep(
                {keys[owners[i]]: (s, misses == 0) for i, (s, misses) in found if whole[owners[i]]}
            )

        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        scorer = Scorer(self.model, self.max_length, self.batch_size, self.bar, self.together)
        for i, (score, misses) in zip(owners, scorer.score(pieces, write), strict=True):
            totals[i] += score
            greedy[i] &= misses == 0
        answers = list(zip(totals, greedy, strict=True))
        if self.groups.rank == 0:  # pieces may be of several replicas, and an empty text has none
            self._answers.keep({keys[i]: answers[i] for i in range(len(pairs)) if not whole[i]})
        return answers

    def _write(
        self, mine: Sequence[int], requests: Sequence[Instance], keys: Sequence[str]
    ) -> dict[int, Any]:
        """The text of each of this replica's requests, or why there is none, by its number.

        Each text is written down under its key as soon as it is there. Collective over the replica.
        """
        asked = [self._request(*requests[i].args, index=i) for i in mine]
        texts: dict[int, Any] = dict.fromkeys(mine, "")
        rows = self.batch_size or AUTOMATIC_ROWS
        for number, progress in decode_all(self.model, self.tokenizer, asked, rows):
            i = mine[number]
            texts[i] += progress.text
            if progress.finish == "error":
                texts[i] = NotFiniteError(progress.message)
                if not self.together:
                    raise texts[i]
            elif progress.finish is not None:
                if self._speaks:
                    self._answers.keep({keys[i]: texts[i]})
                self.bar.update()
        return texts

    def _request(self, context: str, options: dict[str, Any], index: int) -> Request:
        """To continue `context`; `index` numbers the request, for its random numbers."""
        until, limit, sampling = generation_options(options, self.max_length)
        prompt = self.tokenizer.tokenize(context)[-(self.max_length - limit) :]
        return Request(
            prompt=tuple(prompt or [self.tokenizer.eod]),
            maximum_tokens=limit,
            sampling=sampling,
            stop=tuple(until),
            seed=prompt_seed(self.seed, index),
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
