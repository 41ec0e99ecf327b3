"""Sampling against distributions worked out by hand or by loops."""

from __future__ import annotations

import math

import pytest
import torch

from neox.inference.sampling import Sampling, choose, draw, probabilities, prompt_generator

LOG = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()


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
    assert torch.allclose(probabilities(logits, sampling), expected, atol=1e-12)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.5, top_k=5), Sampling(top_p=0.8), Sampling(top_k=3)]
)
def test_frequencies_follow_the_distribution(sampling):
    count = 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    expected = probabilities(logits[None], sampling)[0]
    chosen = choose(logits.expand(count, 12), sampling, torch.Generator().manual_seed(4))
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
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0]])
    assert choose(logits, Sampling(), generator).tolist() == [1, 0]
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
    even = torch.zeros(1, 4)  # four times exactly 0.25
    kept = probabilities(even, Sampling(top_p=0.5))
    assert kept.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_nucleus_is_taken_from_what_top_k_leaves():
    # Of 0.5 and 0.25 alone the first holds 2/3.
    assert (probabilities(LOG, Sampling(top_k=2, top_p=0.6)) > 0).tolist() == [[True] + [False] * 3]


def test_top_k_keeps_what_ties_with_the_kth():
    kept = probabilities(LOG, Sampling(top_k=3))
    assert torch.allclose(kept, LOG.exp().double())


def test_rows_are_independent():
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(5))
    sampling = Sampling(0.8, 10, 0.9)
    both = probabilities(logits, sampling)
    assert torch.equal(both[0], probabilities(logits[:1], sampling)[0])
    assert torch.equal(both[1], probabilities(logits[1:], sampling)[0])


def test_impossible_tokens_are_never_drawn():
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]], dtype=torch.float64)
    largest = 1 - 2.0**-53
    for uniform, token in [(0.0, 1), (0.2999, 1), (0.3001, 3), (largest, 3)]:
        assert draw(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]
    many = torch.rand(100, 999, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    many[:, -1] = 0.0
    ends = draw(many / many.sum(-1, keepdim=True), torch.full((100,), largest, dtype=torch.float64))
    assert (ends == 997).all()


def test_streams_differ_by_seed_and_prompt_and_repeat():
    def first(seed: int, index: int) -> float:
        return torch.rand((), generator=prompt_generator(seed, index), dtype=torch.float64).item()

    streams = {first(seed, index) for seed in (0, 1, 1234, 2**32, 2**40) for index in range(20)}
    assert len(streams) == 100
    assert first(1234, 7) == first(1234, 7)
