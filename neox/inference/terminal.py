"""Prompts typed at a terminal: lines that can be edited, a history of them, and Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, ModuleType

from neox import atomic, log

PROMPT, MORE = "Context prompt >>> ", "... "
BANNER = (
    "Ctrl-C stops an answer. At the prompt it clears what is typed; twice at an empty prompt it "
    "ends,\nas Ctrl-D does. {goes_on} :help lists commands."
)
HISTORY_LENGTH = 1000


class Terminal:
    """A person at a terminal, on rank 0. A context: inside it, Ctrl-C is this class's affair.

    While a prompt is read, Ctrl-C clears it. At any other time the first Ctrl-C sets `interrupted`,
    for who writes an answer to stop; a second one is a KeyboardInterrupt.

    claim: told True when Ctrl-C is to reach this process and nothing else is to act on it, and
        False when it is to end the run, as it does at first.
    """

    def __init__(self, prompt_end: str, claim: Callable[[bool], None]) -> None:
        self.interrupted = False
        self._prompt_end = prompt_end
        self._claim = claim
        self._reading = False
        self._lines = 0  # of the prompt that is being typed
        self._readline = _line_editing()
        self._history = History()
        if self._readline is not None:
            for entry in self._history.load():
                self._readline.add_history(entry)

    def __enter__(self) -> Terminal:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        goes_on = f"A prompt ends with {self._prompt_end.strip()}."
        if self._prompt_end == "\n":
            goes_on = "A line that ends in \\ goes on in the next."
        self.tell(BANNER.format(goes_on=goes_on))
        return self

    def __exit__(self, *error: object) -> None:
        self._claim(False)
        signal.signal(signal.SIGINT, self._before)

    def tell(self, line: str) -> None:
        """Print a line about the conversation; standard output is for prompts and answers."""
        print(line, file=sys.stderr, flush=True)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._reading or self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._claim(False)

    def read(self) -> str | None:
        """The next prompt that is not blank, or command; None at the end."""
        self._claim(True)
        self.interrupted = False
        warned = False
        while True:
            try:
                self._reading = True
                text = self._read()
            except EOFError:
                return None
            except KeyboardInterrupt:
                print()
                if warned and not self._has_typed():
                    return None
                warned = not self._has_typed()
                if warned:
                    self.tell("(Ctrl-C again or Ctrl-D ends)")
                continue
            finally:
                self._reading = False
            if text.strip():
                return text
            warned = False

    def _has_typed(self) -> bool:
        """Whether Ctrl-C cleared something. Without readline a first line is taken for empty."""
        line = "" if self._readline is None else self._readline.get_line_buffer()
        return self._lines > 0 or line != ""

    def _read(self) -> str:
        """One prompt. KeyboardInterrupt; EOFError where nothing comes any more."""
        self._lines = 0
        text = input(PROMPT)
        self._lines = 1
        if text.startswith(":"):
            self._remember(text)
            return text
        with contextlib.suppress(EOFError):
            if self._prompt_end == "\n":
                # Lines that were pasted, or come from the history, are inside `text` already.
                while text.endswith("\\"):
                    text = text[:-1] + "\n"
                    text += input(MORE)
            else:
                text += "\n"
                while self._prompt_end not in text:
                    text += input(MORE) + "\n"
        if self._prompt_end != "\n":
            text, end, _ = text.partition(self._prompt_end)
            self._remember((text + end).rstrip("\n"))
            return text
        self._remember(text)
        return text

    def _remember(self, text: str) -> None:
        if self._readline is not None and text.strip():
            last = self._readline.get_history_item(self._readline.get_current_history_length())
            if text != last:
                self._readline.add_history(text)
                self._history.add(text)


def _line_editing() -> ModuleType | None:
    """readline, by which `input` edits lines; None where there is none, or no use for it."""
    if not sys.stdout.isatty():  # `input` does not use it then
        return None
    try:
        import readline
    except ImportError:
        return None
    readline.set_auto_history(False)  # lines: whole prompts are wanted
    if os.environ.get("TERM", "dumb") != "dumb":
        # A terminal then says what is pasted, whose line ends do not end the prompt.
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


class History:
    """The last prompts of this user, one JSON string a line: prompts may have several lines.

    In `$XDG_STATE_HOME/neox/prompts.jsonl`. Conversations that run side by side add to one file.
    A file that cannot be used costs the history and a warning, nothing more.
    """

    def __init__(self) -> None:
        state = Path(os.environ.get("XDG_STATE_HOME", ""))
        if not state.is_absolute():  # the standard wants it ignored then
            state = Path("~/.local/state").expanduser()
        self._path = state / "neox" / "prompts.jsonl"
        self._kept = True

    def load(self) -> list[str]:
        """The prompts from the oldest to the newest; also cuts a file that has grown long."""
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
            if len(lines) > 2 * HISTORY_LENGTH:
                lines = lines[-HISTORY_LENGTH:]
                atomic.write_text(self._path, "".join(f"{line}\n" for line in lines))
                self._path.chmod(0o600)
        except FileNotFoundError:
            return []
        except OSError as error:
            self._lost(error)
            return []
        return [entry for entry in map(_entry, lines[-HISTORY_LENGTH:]) if entry is not None]

    def add(self, text: str) -> None:
        if not self._kept:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(file, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(text) + "\n")
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        self._kept = False
        log.warning(f"prompts are not remembered: {self._path}: {error.strerror}")


def _entry(line: str) -> str | None:
    """The prompt in a line; None where it is damaged or nothing that readline takes."""
    try:
        text = json.loads(line)
        text.encode()  # a lone surrogate has no bytes
    except (ValueError, AttributeError, RecursionError):
        return None
    return None if "\0" in text else text
