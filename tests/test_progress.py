"""The page: what one side writes, the other reads; and all ranks stop after one step."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from neox import progress
from neox.progress import SIZE, Page


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    made = Page(bytearray(SIZE))
    monkeypatch.setattr(progress, "_page", made)
    return made


def test_what_is_written_is_read(page: Page) -> None:
    mark = page.mark()
    page.begin_call(b"all_reduce of tp", 7, 1 << 40)
    progress.do("loading")
    at = page.read()
    assert (at.call, at.number, at.size, at.waiting) == ("all_reduce of tp", 7, 1 << 40, True)
    assert (at.doing, at.iteration) == ("loading", 0)
    assert page.mark() != mark
    page.end_call(b"all_reduce of tp", 7, 1 << 40)
    assert not page.read().waiting
    for act in (lambda: page.begin_step(12), page.tick):
        mark = page.mark()
        act()
        assert page.mark() != mark and page.read().iteration == 12


def test_what_the_keeper_writes_is_no_progress(page: Page) -> None:
    mark = page.mark()
    page.hold, page.stop_after, page.asked = True, 3, signal.SIGTERM
    assert page.mark() == mark


def test_a_held_rank_waits_before_its_next_step_until_it_knows_the_last(page: Page) -> None:
    page.hold = True
    thread = threading.Thread(target=progress.begin_step, args=(5,))
    thread.start()
    while page.iteration != 5:
        pass
    assert thread.is_alive()
    page.stop_after = 6
    thread.join(20)
    assert not thread.is_alive()
    assert not progress.stops_after(5) and progress.stops_after(6)


@pytest.mark.parametrize("number", progress.STOP_SIGNALS)
def test_a_signal_ends_one_process_after_its_step(page: Page, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with progress.stopping_after_a_step(possible=True):
        progress.begin_step(8)
        assert not progress.stops_after(8)
        os.kill(os.getpid(), number)
        assert progress.stops_after(8) and progress.asked_by() == number.name
        assert signal.getsignal(number) == before, "a second one does what it did"
    with progress.stopping_after_a_step(possible=False):
        assert signal.getsignal(number) == before
