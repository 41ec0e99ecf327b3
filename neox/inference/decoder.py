"""Continuous batching: requests come and go while the others run, in the rows of one cache."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from neox.inference.answer import Answer
from neox.inference.choosing import choose_all
from neox.inference.request import Progress, Request, check
from neox.inference.rows import CHUNK, Row, Rows
from neox.inference.stages import InferenceModel
from neox.tokenizer import Tokenizer


class Decoder:
    """Serves requests with one model.

    A replicated state machine: every rank of the replica submits and cancels the same requests in
    the same order, and all call `step` together. One rank of the last stage chooses the tokens and
    tells the others. It is for one thread.

    What is computed for a request does not depend on what else runs: a prompt has passes of its
    own, of `chunk` positions from its beginning on, and everything else is done row by row. That
    goes for products with packed weights, too (docs/inference.md); only where torch makes them may
    their sums depend on the number of rows (docs/numerics.md).
    """

    def __init__(
        self,
        model: InferenceModel,
        tokenizer: Tokenizer,
        rows: int,
        max_length: int | None = None,
        chunk: int = CHUNK,
    ) -> None:
        """rows: answers that run at once, each of at most `max_length` tokens with its prompt;
        by default and at most seq_length."""
        longest = model.config.seq_length
        self.max_length = longest if max_length is None else max_length
        assert 1 < self.max_length <= longest, (self.max_length, longest)
        self._model = model
        self._tokenizer = tokenizer
        self._chunk = chunk
        self._cache = model.new_cache(rows, self.max_length)
        self._rows = Rows(self._cache, chunk)
        self._ids = itertools.count()
        self._waiting: deque[Answer] = deque()
        # Their prompts are being computed; the first has the next turn.
        self._starting: dict[int, tuple[Answer, Row]] = {}
        self._running: dict[int, tuple[Answer, Row]] = {}
        self._cancelled: list[Progress] = []

    @property
    def idle(self) -> bool:
        """Whether a step would have nothing to do and nothing to tell."""
        return not (self.waiting or self.running or self._cancelled)

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a row."""
        return len(self._starting) + len(self._running)

    def submit(self, request: Request) -> int:
        """Queue a request; its id. Raises RequestError if it cannot be served."""
        check(request, self._tokenizer.vocab_size, self.max_length)
        self._model.select(request.adapter)
        answer = Answer(next(self._ids), request, self._tokenizer, self.max_length)
        self._waiting.append(answer)
        return answer.id

    def cancel(self, id: int) -> None:
        """Free a request's row at once; the next step tells. Ids that do not run are ignored."""
        for answer in self._waiting:
            if answer.id == id:
                self._waiting.remove(answer)
                self._cancelled.append(answer.cancel())
                return
        for held in (self._starting, self._running):
            if id in held:
                answer, row = held.pop(id)
                self._rows.give_up(row)
                self._cancelled.append(answer.cancel())

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """Compute a chunk of positions of prompts, and a token of every answer that runs.

        At most one Progress a request; none for one that waits or whose prompt goes on. Collective
        over the replica.
        """
        told, self._cancelled = self._cancelled, []
        # Those that were running before: who gets the first token in this step has had its turn.
        running = list(self._running.values())
        told += self._start()
        by_adapter: dict[str | None, list[tuple[Answer, Row]]] = {}
        for answer, row in sorted(running, key=lambda pair: pair[1].index):
            by_adapter.setdefault(answer.request.adapter, []).append((answer, row))
        for group in by_adapter.values():
            told += self._decode(group)
        return told

    def _start(self) -> list[Progress]:
        """Passes over prompts, of `chunk` positions in all or up to twice as many.

        They take turns: one that is long keeps neither the running ones waiting nor other prompts.
        """
        told: list[Progress] = []
        computed = 0
        while computed < self._chunk:
            while self._waiting and self._rows.any_free:
                answer = self._waiting.popleft()
                request = answer.request
                row = self._rows.take(request.prompt, request.adapter)
                self._starting[answer.id] = answer, row
            if not self._starting:
                break
            answer, row = self._starting.pop(next(iter(self._starting)))
            self._rows.extend(row, answer.request.prompt)
            computed += min(self._chunk, len(answer.request.prompt) - row.length)
            told += self._prefill(answer, row)
        return told

    def _prefill(self, answer: Answer, row: Row) -> list[Progress]:
        """The next chunk of a prompt, and behind the last one the first token."""
        prompt = answer.request.prompt
        chunk = prompt[row.length : row.length + self._chunk]
        is_last = row.length + len(chunk) == len(prompt)
        self._model.select(answer.request.adapter)
        view = self._cache.view([row.index], [row.length], len(chunk))
        logits = self._model(torch.tensor([chunk]), view, logits="last" if is_last else "none")
        self._rows.add(row, chunk)
        if not is_last:
            self._starting[answer.id] = answer, row  # behind the others
            return []
        self._running[answer.id] = answer, row
        return self._choose([(answer, row)], logits)

    def _decode(self, group: Sequence[tuple[Answer, Row]]) -> list[Progress]:
        """One pass over the last token of each, all of one adapter."""
        self._model.select(group[0][0].request.adapter)
        rows = [row for _, row in group]
        view = self._cache.view([row.index for row in rows], [row.length for row in rows], 1)
        last = torch.tensor([[answer.tokens[-1]] for answer, _ in group])
        logits = self._model(last, view, logits="last")
        for row in rows:
            row.length += 1
        return self._choose(group, logits)

    def _choose(
        self, group: Sequence[tuple[Answer, Row]], logits: torch.Tensor | None
    ) -> list[Progress]:
        answers = [answer for answer, _ in group]
        choices = choose_all(self._model, self._tokenizer, answers, logits)
        told = []
        for (answer, row), choice in zip(group, choices, strict=True):
            progress = answer.take(choice)
            if progress.finish is not None:
                if progress.finish == "error":
                    self._rows.erase(row)
                self._rows.give_up(row)
                del self._running[answer.id]
            told.append(progress)
        return told


def decode_all(
    model: InferenceModel,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    rows: int,
    begin: Callable[[int], object] = lambda number: None,
) -> Iterator[tuple[int, Progress]]:
    """Serve requests, at most `rows` at a time: (which of them, what it got), as it comes.

    `begin` is told which one is next to be served. Raises RequestError when the turn comes to one
    that cannot be. Collective over the replica.
    """
    if not requests:
        return
    rows = min(rows, len(requests))
    longest = max(len(request.prompt) + request.maximum_tokens for request in requests)
    decoder = Decoder(model, tokenizer, rows, min(longest, model.config.seq_length))
    numbers: dict[int, int] = {}
    queue = iter(range(len(requests)))
    while True:
        for number in itertools.islice(queue, rows - decoder.running - decoder.waiting):
            begin(number)
            numbers[decoder.submit(requests[number])] = number
        if decoder.idle:
            return
        for progress in decoder.step():
            yield numbers[progress.id], progress
