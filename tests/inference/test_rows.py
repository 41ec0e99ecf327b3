"""Which row a prompt gets: what it can share is found, and what others could share is kept."""

from __future__ import annotations

import torch

from neox.inference.cache import KVCache
from neox.inference.rows import Row, Rows


class Prompts(Rows):
    """Rows of chunks of 2, into which whole prompts are put at once."""

    def __init__(self, rows: int) -> None:
        self.memory = KVCache(1, rows, 1, 16, 1, torch.float32, "cpu")
        super().__init__(self.memory, chunk=2)

    def hold(self, prompt: list[int], adapter: str | None = None) -> tuple[Row, int]:
        """Its row, and how much of it was there."""
        row = self.take(prompt, adapter)
        there = row.length
        assert self.memory.keys_LRKTD[0, row.index, 0, :there, 0].tolist() == prompt[:there]
        self.memory.keys_LRKTD[0, row.index, 0, : len(prompt), 0] = torch.tensor(prompt).float()
        for start in range(there, len(prompt), 2):
            self.add(row, prompt[start : start + 2])
        return row, there

    def serve(self, prompt: list[int], adapter: str | None = None) -> tuple[int, int]:
        row, there = self.hold(prompt, adapter)
        self.give_up(row)
        return row.index, there


def test_a_row_that_holds_nothing_else_is_taken_as_it_is():
    rows = Prompts(3)
    assert rows.serve([1, 2, 3, 4, 5]) == (0, 0)
    assert rows.serve([1, 2, 3, 4, 9, 9, 9]) == (0, 4)


def test_a_row_that_holds_more_stays_and_is_copied():
    rows = Prompts(3)
    rows.serve([1, 2, 3, 4, 5, 6])
    assert rows.serve([1, 2, 3, 9, 9]) == (1, 2)
    assert rows.serve([1, 2, 3, 4, 5, 6, 7]) == (0, 6)
    assert rows.serve([1, 2, 3, 9, 9]) == (1, 4)


def test_a_single_row_loses_what_does_not_fit():
    rows = Prompts(1)
    rows.serve([1, 2, 3, 4, 5, 6])
    assert rows.serve([1, 2, 3, 9]) == (0, 2)
    assert rows.serve([1, 2, 3, 4, 5, 6]) == (0, 2)


def test_the_last_token_is_never_shared():
    rows = Prompts(2)
    rows.serve([1, 2, 3, 4])
    assert rows.serve([1, 2, 3, 4]) == (1, 2)
    assert rows.serve([1, 2])[1] == 0
    assert rows.serve([1, 2, 3])[1] == 2


def test_what_runs_is_copied_from_and_never_taken():
    rows = Prompts(3)
    first, _ = rows.hold([1, 2, 3, 4, 5])
    second, there = rows.hold([1, 2, 3, 4, 6])
    assert (first.index, second.index, there) == (0, 1, 4)
    third, there = rows.hold([7, 8, 9])
    assert (third.index, there, rows.any_free) == (2, 0, False)


def test_a_row_gets_what_another_has_come_to_hold_and_no_more():
    rows = Prompts(3)
    first, second = [rows.take([1, 2, 3, 4, 5, n], None) for n in (6, 7)]
    rows.extend(second, [1, 2, 3, 4, 5, 7])
    assert (second.length, second.known) == (0, [])
    for start in (0, 2):
        rows.memory.keys_LRKTD[0, first.index, 0, start : start + 2, 0] = torch.tensor(
            [start + 1.0, start + 2.0]
        )
        rows.add(first, [start + 1, start + 2])
        rows.extend(second, [1, 2, 3, 4, 5, 7])
        assert second.length == first.length == start + 2
    assert rows.memory.keys_LRKTD[0, second.index, 0, :4, 0].tolist() == [1, 2, 3, 4]
    rows.give_up(first)  # cancelled
    assert rows.hold([1, 2, 3, 4, 9])[1] == 4


def test_rows_without_anything_to_share_go_first_then_the_oldest():
    rows = Prompts(3)
    assert [rows.serve([i])[0] for i in range(3)] == [0, 0, 0]
    assert [rows.serve([i] * 5)[0] for i in (1, 2, 3)] == [0, 1, 2]
    assert rows.serve([1, 1, 5]) == (1, 2)  # not 0, which was of use just now
    assert [rows.serve([i] * 5)[0] for i in (4, 5, 6)] == [2, 0, 1]


def test_another_adapter_shares_nothing():
    rows = Prompts(2)
    rows.serve([1, 2, 3], "a")
    assert rows.serve([1, 2, 3]) == (1, 0)
    assert rows.serve([1, 2, 3], "a") == (0, 2)


def test_an_erased_row_shares_nothing():
    rows = Prompts(1)
    row, _ = rows.hold([1, 2, 3])
    rows.erase(row)
    rows.give_up(row)
    assert rows.serve([1, 2, 3]) == (0, 0)
