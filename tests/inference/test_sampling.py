"""Sampling against distributions worked out by hand or by loops."""

from __future__ import annotations

import math

import pytest
import torch

from neox.inference import sampling as module
from neox.inference.sampling import Sampling, choose, draw, penalize, possible, prompt_seed

LOG = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()


def probabilities(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Of every token, 0 for those that are not possible."""
    tokens_C, weights_C = possible(logits_V, sampling)
    found = torch.zeros(len(logits_V), dtype=torch.float64)
    found[tokens_C] = weights_C / weights_C.sum()
    return found


def by_loops(logits: list[float], sampling: Sampling) -> list[float]:
    """The same distribution from its definition, token by token."""
    temperature = sampling.temperature or 1.0
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    if sampling.top_k:
        ranked = sorted(weights, key=lambda token: -weights[token])
        weights = {token: weights[token] for token in ranked[: sampling.top_k]}
    if sampling.top_p:
        total = sum(weights.values())
        kept, reached = {}, 0.0
        for token in sorted(weights, key=lambda token: -weights[token]):
            kept[token] = weights[token]
            reached += weights[token] / total
            if reached >= sampling.top_p:
                break
        weights = kept
    total = sum(weights.values())
    return [weights.get(token, 0.0) / total for token in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 99])
@pytest.mark.parametrize("top_p", [0.0, 0.01, 0.4, 0.9, 1.0])
def test_distribution_is_the_definition(temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    logits = 3 * torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    expected = torch.tensor(
        [by_loops(row, sampling) for row in logits.tolist()], dtype=torch.float64
    )
    for row, wanted in zip(logits, expected, strict=True):
        assert torch.allclose(probabilities(row, sampling), wanted, atol=1e-12)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999, 1.0 - 1e-15])
def test_the_likeliest_alone_give_what_sorting_all_does(monkeypatch, spread, top_p):
    """Among 5000 tokens, many of which are equally likely."""
    logits = spread * torch.randn(5000, generator=torch.Generator().manual_seed(2))
    for row in (logits, logits.mul(8).round().div(8), torch.zeros(5000)):
        quick = possible(row, Sampling(top_p=top_p))
        monkeypatch.setattr(module, "LIKELIEST", 5000)
        for got, expected in zip(quick, possible(row, Sampling(top_p=top_p)), strict=True):
            assert torch.equal(got, expected)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.5, top_k=5), Sampling(top_p=0.8), Sampling(top_k=3)]
)
def test_frequencies_follow_the_distribution(sampling):
    count = 10_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    expected = probabilities(logits, sampling)
    generator = torch.Generator().manual_seed(4)
    chosen = torch.tensor([choose(logits, sampling, generator) for _ in range(count)])
    seen = torch.bincount(chosen, minlength=12).double()
    assert not seen[expected == 0].any()
    possible = expected > 0
    expected_counts = count * expected[possible]
    chi_square = ((seen[possible] - expected_counts) ** 2 / expected_counts).sum()
    # With k degrees of freedom chi-square is k on average, with a variance of 2 k.
    freedom = possible.sum().item() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_greedy_only_when_everything_is_zero():
    assert Sampling().is_greedy
    for sampling in (Sampling(0.5), Sampling(top_k=1), Sampling(top_p=0.1)):
        assert not sampling.is_greedy


def test_greedy_takes_the_first_of_equals_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert choose(torch.tensor([1.0, 3.0, 3.0]), Sampling(), generator) == 1
    assert torch.equal(generator.get_state(), before)


def test_temperature_zero_beside_a_filter_means_one():
    for filters in ({"top_k": 3}, {"top_p": 0.9}):
        zero = probabilities(LOG, Sampling(0.0, **filters))
        assert torch.equal(zero, probabilities(LOG, Sampling(1.0, **filters)))


@pytest.mark.parametrize(
    "top_p, kept",
    [(1e-9, 1), (0.4999, 1), (0.5001, 2), (0.75001, 3), (0.87501, 4), (1.0, 4)],
)
def test_nucleus_is_the_smallest_set_that_reaches_p(top_p, kept):
    assert (probabilities(LOG, Sampling(top_p=top_p)) > 0).sum() == kept


def test_nucleus_stops_at_exactly_p_and_splits_ties():
    even = torch.zeros(4)  # four times exactly 0.25
    kept = probabilities(even, Sampling(top_p=0.5))
    assert kept.tolist() == [0.5, 0.5, 0.0, 0.0]


def test_nucleus_is_taken_from_what_top_k_leaves():
    # Of 0.5 and 0.25 alone the first holds 2/3.
    assert (probabilities(LOG, Sampling(top_k=2, top_p=0.6)) > 0).tolist() == [True] + [False] * 3


def test_top_k_keeps_what_ties_with_the_kth():
    kept = probabilities(LOG, Sampling(top_k=3))
    assert torch.allclose(kept, LOG.exp().double())


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3, 1e300])
def test_any_temperature_leaves_numbers(temperature):
    logits = torch.tensor([2.0, -40.0, 2.0, -math.inf])
    for filters in ({}, {"top_k": 3}, {"top_p": 0.99}):
        got = probabilities(logits, Sampling(temperature, **filters))
        expected = [0.5, 0.0, 0.5, 0.0] if temperature < 1 else [1 / 3, 1 / 3, 1 / 3, 0.0]
        assert got.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_the_penalty_is_that_of_transformers(penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(7))
    tokens = [3, 3, 8, 41, 3, 0]
    before = logits.clone()
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits[None])
    assert torch.equal(penalize(logits, tokens, penalty), theirs[0])
    assert torch.equal(logits, before) and not torch.equal(theirs[0], before)


def test_impossible_tokens_are_never_drawn():
    tokens = torch.tensor([4, 5, 6, 7, 9])
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    largest = torch.tensor(1 - 2.0**-53, dtype=torch.float64)
    for uniform, token in [(0.0, 5), (0.2999, 5), (0.3001, 7), (largest, 7)]:
        assert draw(tokens, weights, torch.as_tensor(uniform, dtype=torch.float64)) == token
    many = torch.rand(100, 999, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    many[:, -1] = 0.0
    assert all(draw(torch.arange(999), row, largest) == 997 for row in many)


def test_streams_differ_by_seed_and_prompt():
    seeds = {prompt_seed(seed, i) for seed in (0, 1, 1234, 2**32, 2**40) for i in range(20)}
    assert len(seeds) == 100
