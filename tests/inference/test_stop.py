"""Text that comes in pieces ends before the first stop string, and nothing of that was let out."""

from __future__ import annotations

import random

import pytest

from neox.inference.stop import StopStrings


def read(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    """What each piece lets through, and whether the text ended."""
    stop = StopStrings(stops)
    out = []
    for piece in pieces:
        text, ended = stop.push(piece)
        out.append(text)
        if ended:
            return out, True
    return [*out, stop.flush()], False


def test_the_text_ends_before_the_stop_string():
    assert read(["one\n", "tw", "o"], ["\n"]) == (["one"], True)
    assert read(["ab", "<st", "op", ">", "cd"], ["<stop>"]) == (["ab", "", "", ""], True)
    assert read(["é", "日"], ["日"]) == (["é", ""], True)
    assert read(["anything"], []) == (["anything", ""], False)


def test_what_only_began_as_a_stop_string_comes_after_all():
    assert read(["a<st", "art", "<"], ["<stop>"]) == (["a", "<start", "", "<"], False)
    assert read(["aab", "aac"], ["aabaad"]) == (["", "aabaac", ""], False)


def test_the_first_that_is_complete_counts_however_the_text_is_cut():
    assert read(["xabcy"], ["abc", "b"]) == (["xa"], True)
    assert read(["xabcy"], ["bc", "abc"]) == (["x"], True)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_no_difference(seed):
    chance = random.Random(seed)
    text = "".join(chance.choices("aab.", k=60))
    stops = ["".join(chance.choices("aab.", k=chance.randint(2, 7))) for _ in range(3)]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    for _ in range(20):
        cuts = sorted(chance.sample(range(1, 60), chance.randint(0, 30)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, 60], strict=True)]
        out, ended = read(pieces, stops)
        assert ("".join(out), ended) == (expected, bool(ends))
