"""The decoding loop and the result it makes of a prompt."""

from __future__ import annotations

import itertools

import pytest
import torch

from neox.errors import CheckpointError
from neox.inference.generate import NOT_STARTED, completions, continuation
from tests.inference.fakes import VOCABULARY, ByteTokenizer, FakeModel, config, mixed, script

EOD = ByteTokenizer.eod
KEYS = ["context", "text", "length", "finished", "message", "duration_seconds"]


def steps(model: FakeModel, prompt: list[int], index: int = 0):
    return continuation(model, ByteTokenizer(), model.config, prompt, index)


def tokens(model: FakeModel, prompt: list[int]) -> list[int]:
    return [step.token for step in steps(model, prompt)]


def test_greedy_follows_the_largest_logit():
    history = [5, 6, 7]
    for _ in range(10):
        history.append(mixed(history).argmax().item())
    assert tokens(FakeModel(config(maximum_tokens=10)), [5, 6, 7]) == history[3:]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9}])
def test_cache_and_recompute_give_the_same_tokens(sampling):
    cached = FakeModel(config(maximum_tokens=10, **sampling))
    recomputed = FakeModel(config(maximum_tokens=10, recompute=True, **sampling))
    assert tokens(cached, [1, 2, 3, 4]) == tokens(recomputed, [1, 2, 3, 4])
    assert cached.shapes == [(1, 4)] + 9 * [(1, 1)]
    assert recomputed.shapes == [(1, 4 + i) for i in range(10)]


def test_each_step_has_the_logits_it_was_chosen_from():
    history = [9]
    model = FakeModel(config(maximum_tokens=5, temperature=1.0, return_logits=True))
    for step in steps(model, [9]):
        assert torch.equal(step.logits_V, mixed(history))
        history.append(step.token)


def test_end_of_document_ends():
    model = FakeModel(config(), script(2, [10, 11, EOD, 12]))
    assert tokens(model, [1, 2]) == [10, 11, EOD]
    assert len(model.shapes) == 3


def test_a_reader_may_stop_early():
    model = FakeModel(config(maximum_tokens=50))
    assert len(list(itertools.islice(steps(model, [3]), 4))) == 4
    assert len(model.shapes) == 4


@pytest.mark.parametrize("recompute", [False, True])
def test_logits_that_are_no_numbers_are_an_error(recompute):
    model = FakeModel(
        config(recompute=recompute), lambda history: torch.full((VOCABULARY,), float("nan"))
    )
    with pytest.raises(CheckpointError, match="logits after 2 tokens are not finite"):
        tokens(model, [1, 2])


def test_results_before_one_that_fails_are_there():
    def some_bad(history: list[int]) -> torch.Tensor:
        bad = history[0] == ord("b")
        return torch.full((VOCABULARY,), float("inf")) if bad else mixed(history)

    settings = config(maximum_tokens=9)
    contexts = [(0, "a"), (1, "b"), (2, "c")]
    results = completions(FakeModel(settings, some_bad), ByteTokenizer(), settings, contexts)
    assert next(results)["length"] == 9
    with pytest.raises(CheckpointError, match="logits after 1 tokens"):
        next(results)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_results_do_not_depend_on_what_is_computed_together(rows):
    texts = ["abc", "", 70 * "x", "d", 60 * "y", "ab"]
    told = []
    settings = config(
        maximum_tokens=9, temperature=0.7, generate_batch_size=rows, return_logits=True
    )
    contexts = list(enumerate(texts))
    model = FakeModel(settings)
    results = list(completions(model, ByteTokenizer(), settings, contexts, told.append))
    assert sum(told) == 9 * len(texts)
    assert max(shape[0] for shape in model.shapes) == min(rows, 5)
    for index, got in enumerate(results):
        alone = result(
            texts[index], index=index, maximum_tokens=9, temperature=0.7, return_logits=True
        )
        assert got | {"duration_seconds": 0} == alone | {"duration_seconds": 0}


def result(context: str, logits=mixed, index: int = 0, **values):
    settings = config(**values)
    model = FakeModel(settings, logits)
    [only] = completions(model, ByteTokenizer(), settings, [(index, context)])
    return only


def test_result_has_the_fields_in_order():
    got = result("ab", maximum_tokens=7)
    assert list(got) == KEYS
    assert (got["context"], got["length"]) == ("ab", 7)
    assert got["finished"] is False
    assert got["message"] is None
    assert 0 < got["duration_seconds"] < 60
    expected = tokens(FakeModel(config(maximum_tokens=7)), list(b"ab"))
    assert got["text"] == ByteTokenizer().detokenize(expected)


def test_end_of_document_is_not_in_the_text():
    got = result("x", script(1, [*b"hi", EOD]))
    assert (got["text"], got["length"], got["finished"]) == ("hi", 2, True)


def test_nothing_but_the_end():
    got = result("x", script(1, [EOD]))
    assert (got["text"], got["length"], got["finished"]) == (None, 0, True)
    assert got["message"] == NOT_STARTED


def test_an_empty_context_starts_from_the_end_of_a_document():
    got = result("", maximum_tokens=3)
    expected = tokens(FakeModel(config(maximum_tokens=3)), [EOD])
    assert got["context"] == ""
    assert got["text"] == ByteTokenizer().detokenize(expected)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"top_k": 1}, {"top_p": 0.5}], ids=str
)
def test_rows_that_pad_the_vocabulary_are_never_generated(sampling):
    """However likely they are."""

    def padding_first(history: list[int]) -> torch.Tensor:
        logits = torch.full((VOCABULARY,), -30.0)
        logits[ord("a")], logits[ByteTokenizer.vocab_size :] = 10.0, 20.0
        return logits

    got = result("x", padding_first, maximum_tokens=3, **sampling)
    assert (got["text"], got["length"], got["message"]) == ("aaa", 3, None)


def test_prompt_and_completion_fill_seq_length_and_no_more():
    assert result(60 * "a")["length"] == 4
    assert result(63 * "a")["length"] == 1


@pytest.mark.parametrize("length", [64, 65, 500])
def test_a_prompt_without_room_says_so(length):
    got = result(length * "a")
    assert list(got) == KEYS
    assert (got["text"], got["length"], got["finished"]) == (None, 0, False)
    assert got["message"].startswith(f"WARNING: the prompt has {length} tokens")
    assert "seq_length of 64" in got["message"]


def test_samples_repeat_by_seed_and_differ_by_prompt():
    def text(seed: int, index: int) -> str:
        return result("same", index=index, seed=seed, temperature=1.0)["text"]

    assert text(1, 0) == text(1, 0)
    assert len({text(1, 0), text(1, 1), text(2, 0), text(2, 1)}) == 4


def test_logits_have_a_row_for_every_token_asked_for():
    got = result("x", script(1, [7, 8, EOD]), maximum_tokens=5, return_logits=True)
    assert list(got) == [*KEYS, "logits"]
    logits = torch.tensor(got["logits"])
    assert logits.shape == (5, VOCABULARY)
    assert logits.argmax(-1)[:3].tolist() == [7, 8, EOD]
    assert not logits[3:].any()
