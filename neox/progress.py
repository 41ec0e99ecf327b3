"""What a process is doing, in a small page of memory that its keeper reads beside it.

Writing to it costs about a microsecond and never waits. A process without a keeper has a page of
its own, which nobody reads. The keeper writes into it, too: when the run is to end after a step.
"""

from __future__ import annotations

import contextlib
import mmap
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIZE = 256
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# Waiting or not, its number in its group, bytes, since (time.monotonic), its name.
_CALL = struct.Struct("<?7xQQd88s")
_STEP = struct.Struct("<Qd")  # the iteration that was begun, ticks between two are counted there
_DOING = struct.Struct("<48s")
_FLAG = struct.Struct("<B")
_SINCE = struct.Struct("<d")
_NUMBER = struct.Struct("<Q")
_AT_STEP = _CALL.size
_AT_DOING = _AT_STEP + _STEP.size
_AT_STOPPABLE = _AT_DOING + _DOING.size  # up to here a rank writes, and any change is progress
_AT_ASKED = _AT_STOPPABLE + 1  # a signal that asks for a stop, from either side
_AT_HOLD = _AT_ASKED + 1  # the keeper's
_AT_STOP = _AT_HOLD + 6  # the keeper's: the last iteration, 0 for none
assert _AT_STOP + 8 <= SIZE


@dataclass(frozen=True)
class Progress:
    """What a page said at one moment."""

    iteration: int = 0  # that was begun last, 0 before the first
    doing: str = ""
    call: str = ""  # the collective that was begun last: "all_reduce of tp"
    number: int = 0  # its number in its group
    size: int = 0  # its bytes
    since: float = 0.0  # time.monotonic() when it began, or ended if it is not `waiting`
    waiting: bool = False
    stoppable: bool = False  # it acts on a request to stop after a step
    asked: int = 0  # the signal by which somebody asked this process itself
    held: bool = False


class Page:
    """The page, from either side; its writers are never two at one place."""

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self.memory = memory

    def begin_call(self, name: bytes, number: int, size: int) -> None:
        _CALL.pack_into(self.memory, 0, True, number, size, time.monotonic(), name)

    def end_call(self, name: bytes, number: int, size: int) -> None:
        _CALL.pack_into(self.memory, 0, False, number, size, time.monotonic(), name)

    def wait(self, waiting: bool) -> None:
        """Whether what was begun last is waited for."""
        _FLAG.pack_into(self.memory, 0, waiting)
        _SINCE.pack_into(self.memory, 24, time.monotonic())

    def begin_step(self, iteration: int) -> None:
        _STEP.pack_into(self.memory, _AT_STEP, iteration, time.monotonic())

    def tick(self) -> None:
        iteration, _ = _STEP.unpack_from(self.memory, _AT_STEP)
        _STEP.pack_into(self.memory, _AT_STEP, iteration, time.monotonic())

    def do(self, what: str) -> None:
        _DOING.pack_into(self.memory, _AT_DOING, what.encode()[:48])

    @property
    def iteration(self) -> int:
        return _STEP.unpack_from(self.memory, _AT_STEP)[0]

    @property
    def stoppable(self) -> bool:
        return bool(_FLAG.unpack_from(self.memory, _AT_STOPPABLE)[0])

    @stoppable.setter
    def stoppable(self, value: bool) -> None:
        _FLAG.pack_into(self.memory, _AT_STOPPABLE, value)

    @property
    def asked(self) -> int:
        return _FLAG.unpack_from(self.memory, _AT_ASKED)[0]

    @asked.setter
    def asked(self, number: int) -> None:
        _FLAG.pack_into(self.memory, _AT_ASKED, number)

    @property
    def hold(self) -> bool:
        return bool(_FLAG.unpack_from(self.memory, _AT_HOLD)[0])

    @hold.setter
    def hold(self, value: bool) -> None:
        _FLAG.pack_into(self.memory, _AT_HOLD, value)

    @property
    def stop_after(self) -> int:
        return _NUMBER.unpack_from(self.memory, _AT_STOP)[0]

    @stop_after.setter
    def stop_after(self, iteration: int) -> None:
        _NUMBER.pack_into(self.memory, _AT_STOP, iteration)

    def mark(self) -> bytes:
        """Bytes that change whenever the process gets on."""
        return bytes(self.memory[:_AT_STOPPABLE])

    def read(self) -> Progress:
        waiting, number, size, since, call = _CALL.unpack_from(self.memory, 0)
        (doing,) = _DOING.unpack_from(self.memory, _AT_DOING)
        return Progress(
            iteration=self.iteration,
            doing=_text(doing),
            call=_text(call),
            number=number,
            size=size,
            since=since,
            waiting=waiting,
            stoppable=self.stoppable,
            asked=self.asked,
            held=self.hold,
        )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


_page = Page(bytearray(SIZE))
_is_kept = False


def use(page: Page) -> None:
    """Write to `page`, which a keeper reads, from now on."""
    global _page, _is_kept
    _page, _is_kept = page, True


def page() -> Page:
    return _page


def do(what: str) -> None:
    """Say in a few words what begins now: it counts as progress."""
    _page.do(what)


def tick() -> None:
    """Say that it goes on, within something long that sends no messages."""
    _page.tick()


def begin_step(iteration: int) -> None:
    """Say that a step begins; wait, where the run is asked to stop, until it is clear after which.

    All ranks must stop after the same step. So each first waits at its next step. One that is ahead
    can be so by one step only, whose messages the others have still to answer; the supervisor then
    knows the last step that any rank has begun, and that is the one all of them finish.
    """
    _page.begin_step(iteration)  # before looking at `hold`: the keeper sets that, and then reads
    while _page.hold and not _page.stop_after:
        time.sleep(0.005)


def stops_after(iteration: int) -> bool:
    """Whether this was the last step, since somebody asked for that."""
    return bool(_page.stop_after) and iteration >= _page.stop_after


def asked_by() -> str:
    """The name of the signal that asked for a stop."""
    return signal.Signals(_page.asked).name if _page.asked else "deepy.py"


@contextlib.contextmanager
def stopping_after_a_step(possible: bool) -> Iterator[None]:
    """Within it SIGTERM and SIGUSR1 end the run after the step that is being done.

    With `possible` false, or off the main thread, they do what they did before. A second signal
    does so in any case, in a process without a keeper.
    """
    if not possible:
        yield
        return
    before = {}

    def ask(number: int, frame: FrameType | None) -> None:
        if _is_kept:
            _page.asked = number  # the supervisor has all ranks agree
            return
        _page.asked, _page.stop_after = number, max(_page.iteration, 1)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in STOP_SIGNALS:
        before[number] = signal.signal(number, ask)
    _page.stoppable = True
    try:
        yield
    finally:
        _page.stoppable = False
        for number, handler in before.items():
            signal.signal(number, handler)
