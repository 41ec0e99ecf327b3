"""The terminal mode: prompts in, answers out as they come."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from neox import log
from neox.config import NeoXConfig
from neox.errors import ConfigError
from neox.inference.commands import Session
from neox.inference.detokenize import StreamingDetokenizer
from neox.inference.generate import continuation, encode
from neox.inference.request import no_room
from neox.inference.stages import InferenceModel
from neox.inference.terminal import MORE, PROMPT, Terminal
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import Tokenizer

# Nobody knows how long a person thinks: the other ranks wait in a group of their own.
PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Turn:
    """A prompt to be answered, by what is set at the time; `index` is for its random stream."""

    prompt: list[int]
    config: NeoXConfig
    index: int


def interactive(
    model: InferenceModel,
    tokenizer: Tokenizer,
    config: NeoXConfig,
    claim_interrupts: Callable[[bool], None] = lambda claimed: None,
) -> None:
    """Read prompts at the terminal, or from a pipe, and print what follows them as it comes.

    Every prompt stands alone; rank 0 reads and prints. The end of the input ends it. At a terminal
    Ctrl-C stops an answer and not the program; see Terminal, also for `claim_interrupts`.
    Collective over the world: extra replicas repeat the work.
    """
    groups = model.groups
    channel = Channel(groups)
    with contextlib.ExitStack() as stack:
        terminal = None
        turns: Iterator[Turn] = iter(())
        if groups.rank == 0:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(errors="replace")  # a stray byte is U+FFFD and ends nothing
            if sys.stdin is not None and sys.stdin.isatty():
                terminal = stack.enter_context(Terminal(config.prompt_end, claim_interrupts))
            turns = read_turns(terminal, tokenizer, config)
        while (turn := channel.turn(next(turns, None))) is not None:
            answer(model, tokenizer, turn, channel, terminal)
    _say(groups, "\n")


def read_turns(
    terminal: Terminal | None, tokenizer: Tokenizer, config: NeoXConfig
) -> Iterator[Turn]:
    """What is to be answered, from the terminal or else from a pipe, where nothing is a command."""
    session = Session(config)
    while True:
        text = _read_pipe(config.prompt_end) if terminal is None else terminal.read()
        if text is None:
            return
        if terminal is not None and text.startswith(":"):
            if text.strip() == ":quit":
                return
            try:
                terminal.tell(session.command(text))
            except ConfigError as error:
                terminal.tell(f"error: {error}")
            continue
        if terminal is not None and text.startswith("\\:"):
            text = text[1:]
        prompt = encode(tokenizer, text)
        problem = no_room(len(prompt), config.seq_length)
        if problem is None:
            yield Turn(prompt, session.config, session.index)
        else:
            log.warning(problem)
        session.index += 1


def _read_pipe(prompt_end: str) -> str | None:
    """What comes up to `prompt_end` or to the end of the input; None when nothing is left."""
    if sys.stdin is None:  # closed by the shell's <&-
        return None
    text = ""
    try:
        while prompt_end not in text:
            text += input(MORE if text else PROMPT) + "\n"
    except EOFError:
        return text.rstrip() or None
    return text.split(prompt_end)[0]


def answer(
    model: InferenceModel,
    tokenizer: Tokenizer,
    turn: Turn,
    channel: Channel,
    terminal: Terminal | None,
) -> None:
    """Print the answer as it comes, and at a terminal a line about it. Collective over the world.

    `terminal` is None on every rank but 0, and there too if there is none.
    """
    _say(model.groups, "Generated Text: ")
    detokenizer = StreamingDetokenizer(tokenizer, turn.prompt)
    pace = Pace()
    asked = len(turn.prompt) + turn.config.maximum_tokens
    end = "maximum_tokens" if asked <= turn.config.seq_length else "seq_length"
    for token, _ in continuation(model, tokenizer, turn.config, turn.prompt, turn.index):
        if token == tokenizer.eod:
            end = "end of document"
        else:
            pace.count()
            _say(model.groups, detokenizer.push(token))
        if channel.interrupted(terminal):
            end = "Ctrl-C"
            break
    _say(model.groups, detokenizer.flush() + "\n")
    if terminal is not None and sys.stderr.isatty():
        terminal.tell(f"[{pace}; ended by {end}]")


class Pace:
    """Counts tokens and the time they take. The first waits for the prompt to be read."""

    def __init__(self) -> None:
        self._start = self._first = self._last = time.perf_counter()
        self._tokens = 0

    def count(self) -> None:
        self._last = time.perf_counter()
        self._tokens += 1
        if self._tokens == 1:
            self._first = self._last

    def __str__(self) -> str:
        if self._tokens == 0:
            return "no tokens"
        text = f"{self._tokens} token{'s' * (self._tokens > 1)}"
        text += f", the first after {self._first - self._start:.2f} s"
        if self._last > self._first:
            text += f", then {(self._tokens - 1) / (self._last - self._first):.1f} tokens/s"
        return text


class Channel:
    """What rank 0 tells the others. Made, and every method called, by all ranks of the world."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._group = None
        if groups.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    def turn(self, turn: Turn | None) -> Turn | None:
        """Rank 0's `turn`, on every rank."""
        if self._group is None:
            return turn
        held = [turn]
        dist.broadcast_object_list(held, src=0, group=self._group, device=torch.device("cpu"))
        return held[0]

    def interrupted(self, terminal: Terminal | None) -> bool:
        """Whether rank 0's terminal was interrupted: all ranks stop behind the same token."""
        asked = terminal is not None and terminal.interrupted
        if self._group is None:
            return asked
        asked_1 = torch.tensor([asked])
        dist.broadcast(asked_1, src=0, group=self._group)
        return bool(asked_1)


def _say(groups: ProcessGroups, text: str) -> None:
    if groups.rank == 0 and text:
        print(text, end="", flush=True)
