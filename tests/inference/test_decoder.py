"""Many requests in one decoder: each gets what it would alone, whatever the others do."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neox.errors import RequestError
from neox.inference.decoder import Decoder, decode_all
from neox.inference.generate import recomputed
from neox.inference.request import Request
from neox.inference.sampling import Sampling
from neox.inference.stages import InferenceModel
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.inference.fakes import VOCABULARY, ByteTokenizer, FakeModel, config, mixed, script
from tests.inference.served import Served, logits_of, serve
from tests.inference.small import LetterTokenizer, small_model
from tests.models import VOCAB, tokens
from tests.world import World

LENGTH = 48
SHAPE = {"seq_length": LENGTH, "max_position_embeddings": LENGTH}
DRAWN = Sampling(0.9, 20, 0.95, 1.2)
EOD = ByteTokenizer.eod


def some_requests() -> list[Request]:
    """Prompts of 1 to 34 tokens, some of which begin alike; greedy and drawn."""
    long = tuple(tokens(1, 40).clamp(1, VOCAB - 4)[0].tolist())
    lengths = [3, 34, 9, 1, 20, 30, 12, 33]
    greedy = [Request(long[:n], 5 + n % 7, logits=True, logprobs=2) for n in lengths]
    drawn = [replace(r, sampling=DRAWN, seed=i) for i, r in enumerate(greedy[:4])]
    return greedy + drawn


def in_a_decoder(model: InferenceModel, requests: list[Request], rows: int) -> list[Served]:
    decoder = Decoder(model, LetterTokenizer(), rows, chunk=8)
    return serve(decoder, requests[:7], {2 + 3 * i: r for i, r in enumerate(requests[7:])})


def without_a_cache(model: InferenceModel, request: Request) -> Served:
    served = Served()
    for progress in recomputed(model, LetterTokenizer(), request):
        served.add(progress)
    return served


def check_same(got: list[Served], expected: list[Served]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("architecture", [{}, {"sliding_window_width": 7, "num_kv_heads": 2}])
def test_every_answer_is_the_one_computed_alone(architecture):
    model = small_model(ProcessGroups.single(), **SHAPE, **architecture)
    requests = some_requests()
    together = in_a_decoder(model, requests, rows=4)
    assert len({tuple(served.tokens) for served in together}) > 9
    check_same(together, [without_a_cache(model, request) for request in requests])
    for request, served in zip(requests, together, strict=True):
        [alone] = in_a_decoder(model, [request], rows=1)
        assert (served.tokens, served.text) == (alone.tokens, alone.text)
        torch.testing.assert_close(logits_of(served), logits_of(alone), rtol=1e-5, atol=1e-5)


def on_a_grid(rank: int, topology: Topology) -> list[Served]:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    model = small_model(groups, **SHAPE)
    return in_a_decoder(model, some_requests(), rows=4)


@pytest.mark.parametrize(
    "topology", [Topology(tp=2), Topology(pp=2), Topology(tp=2, pp=2)], ids=str
)
def test_every_grid_gives_the_same_answers_on_every_rank(world: World, topology: Topology) -> None:
    model = small_model(ProcessGroups.single(), **SHAPE)
    expected = in_a_decoder(model, some_requests(), rows=4)
    found = world.run(topology.world_size, on_a_grid, topology)
    for got in found:
        check_same(got, expected)
    held = [sum(len(served.logits) for served in got) for got in found]
    source = topology.rank(topology.pp - 1, 0, 0)
    assert [count > 0 for count in held] == [rank == source for rank in range(len(held))]


def test_prompts_in_chunks_give_the_logits_of_whole_ones():
    model = small_model(ProcessGroups.single(), **SHAPE)
    requests = some_requests()
    for one, other in zip(
        serve(Decoder(model, LetterTokenizer(), 2, chunk=8), requests),
        serve(Decoder(model, LetterTokenizer(), 2, chunk=LENGTH), requests),
        strict=True,
    ):
        torch.testing.assert_close(logits_of(one), logits_of(other), rtol=1e-5, atol=1e-5)


class Counting:
    """An InferenceModel that counts its passes over prompts."""

    def __init__(self, model: InferenceModel) -> None:
        self._model = model
        self.prompt_tokens = 0

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __call__(self, tokens_BS: Tensor, *args, **options) -> Tensor | None:
        self.prompt_tokens += tokens_BS.shape[1] if tokens_BS.shape[1] > 1 else 0
        return self._model(tokens_BS, *args, **options)


def test_what_is_shared_is_not_computed_again_and_is_the_same_to_the_last_bit():
    model = Counting(small_model(ProcessGroups.single(), **SHAPE))
    long = some_requests()[1].prompt  # 34 tokens: four chunks of 8
    other = replace(some_requests()[0], prompt=(5, *long[1:20]))
    mixed_up = long[:24] + other.prompt[:9]
    prompts = [long, long, long[:25], mixed_up, long[:8], other.prompt]
    requests = [Request(prompt, 6, logits=True) for prompt in prompts]
    decoder = Decoder(model, LetterTokenizer(), 2, chunk=8)
    costs, served = [], []
    for request in requests:
        before = model.prompt_tokens
        served += serve(decoder, [request])
        costs.append(model.prompt_tokens - before)
    # The last token is always computed, in the chunk it belongs to; passes of 1 are not counted.
    assert costs == [34, 2, 0, 8, 8, 20]
    for request, got in zip(requests, served, strict=True):
        [alone] = serve(Decoder(model, LetterTokenizer(), 1, chunk=8), [request])
        assert torch.equal(logits_of(got), logits_of(alone))


def test_a_prompt_is_shared_while_its_first_owner_runs():
    model = Counting(small_model(ProcessGroups.single(), **SHAPE))
    request = Request(some_requests()[1].prompt, 9, logits=True)
    [alone] = serve(Decoder(model, LetterTokenizer(), 1, chunk=8), [request])
    for later in ({}, {2: request}, {7: request}):
        before = model.prompt_tokens
        served = serve(Decoder(model, LetterTokenizer(), 4, chunk=8), [request] * 3, later)
        assert model.prompt_tokens - before == 34 + (2 + len(later)) * 2
        for one in served:
            assert one.tokens == alone.tokens
            # The first token's logits come of a pass over the prompt alone.
            assert torch.equal(one.logits[0], alone.logits[0])


def test_running_answers_take_one_pass_and_a_long_prompt_does_not_stall_them():
    model = FakeModel(config())
    decoder = Decoder(model, ByteTokenizer(), 3, chunk=8)
    serve(decoder, [Request((1, 2), 6), Request((3,), 6)], {1: Request((4,) * 30, 2)})
    prompts = [(1, 2), (1, 1)]
    assert model.shapes[:2] == prompts
    # Each step from here on has a chunk of the long one and a token of both others.
    assert model.shapes[2:10] == [(1, 8), (2, 1)] * 3 + [(1, 6), (2, 1)]
    assert model.shapes[10:] == [(3, 1)]


def test_prompts_take_turns_so_that_a_short_one_does_not_wait_for_long_ones():
    decoder = Decoder(FakeModel(config()), ByteTokenizer(), 4, chunk=4)
    long = [decoder.submit(Request((i,) * 40, 3)) for i in (1, 2)]
    assert [decoder.step(), decoder.step()] == [[], []] and decoder.running == 2
    short = decoder.submit(Request((3, 4), 3))
    assert (decoder.waiting, decoder.running) == (1, 2)
    told = [[progress.id for progress in decoder.step()] for _ in range(5)]
    # Either long one has its turn, then the short one, with what is left of that step for a long
    # one; from then on the short one gets a token in every step.
    assert told == [[], [], [short], [short], [short]] and decoder.running == 2
    firsts = []
    while not decoder.idle:
        firsts += [progress.id for progress in decoder.step() if progress.finish is None]
    assert list(dict.fromkeys(firsts)) == long


def test_prompts_that_come_and_go_while_others_are_computed_touch_nobody():
    """Five prompts, some alike, in three rows; two are cancelled while they are computed."""
    prompts = [(7,) * 30, (7,) * 25 + (1,), (8, 9) * 10, (7,) * 22, (5, 6)]
    requests = [Request(p, 5, sampling=Sampling(1.0), seed=i) for i, p in enumerate(prompts)]
    decoder = Decoder(FakeModel(config()), ByteTokenizer(), 3, chunk=4)
    ids = [decoder.submit(request) for request in requests[:4]]
    found = {id: Served() for id in ids}
    for step in itertools.count():
        if step == 3:
            assert (decoder.running, decoder.waiting) == (3, 1)
            decoder.cancel(ids[0])
            decoder.cancel(ids[2])
            assert (decoder.running, decoder.waiting) == (1, 1)
            ids.append(decoder.submit(requests[4]))
            found[ids[-1]] = Served()
        if decoder.idle:
            break
        for progress in decoder.step():
            found[progress.id].add(progress)
    ends = [found[id].finish for id in ids]
    assert ends == ["cancelled", "length", "cancelled", "length", "length"]
    assert found[ids[0]].tokens == found[ids[2]].tokens == []
    for i in (1, 3, 4):
        [alone] = serve(Decoder(FakeModel(config()), ByteTokenizer(), 1, chunk=4), [requests[i]])
        assert found[ids[i]] == alone


def test_requests_wait_for_a_row_and_the_counts_tell():
    decoder = Decoder(FakeModel(config()), ByteTokenizer(), 2)
    assert decoder.idle
    ids = [decoder.submit(Request((i,), 3)) for i in range(5)]
    assert (decoder.waiting, decoder.running, decoder.idle) == (5, 0, False)
    first = [progress.id for progress in decoder.step()]
    assert first == ids[:2] and (decoder.waiting, decoder.running) == (3, 2)
    while not decoder.idle:
        decoder.step()
    assert (decoder.waiting, decoder.running) == (0, 0)


def test_cancelling_frees_the_row_at_once_and_touches_nobody_else():
    requests = [Request((i, i + 1), 12, sampling=Sampling(1.0), seed=i) for i in range(4)]
    expected = serve(Decoder(FakeModel(config()), ByteTokenizer(), 4), requests)
    decoder = Decoder(FakeModel(config()), ByteTokenizer(), 2)
    ids = [decoder.submit(request) for request in requests]
    found = {id: Served() for id in ids}

    def step() -> None:
        for progress in decoder.step():
            found[progress.id].add(progress)

    step()
    step()
    decoder.cancel(ids[0])  # runs
    decoder.cancel(ids[2])  # waits
    decoder.cancel(ids[2])
    decoder.cancel(99)
    assert (decoder.running, decoder.waiting) == (1, 1)
    step()
    assert (decoder.running, decoder.waiting) == (2, 0)
    while not decoder.idle:
        step()
    assert [found[id].finish for id in ids] == ["cancelled", "length", "cancelled", "length"]
    assert found[ids[0]].tokens == expected[0].tokens[:2] and found[ids[2]].tokens == []
    assert found[ids[0]].text == ByteTokenizer().detokenize(found[ids[0]].tokens)
    for i in (1, 3):
        assert found[ids[i]] == expected[i]


def test_a_prompt_that_is_being_computed_can_be_cancelled():
    model = FakeModel(config())
    decoder = Decoder(model, ByteTokenizer(), 1, chunk=4)
    id = decoder.submit(Request((7,) * 20, 3))
    assert decoder.step() == [] and decoder.running == 1
    decoder.cancel(id)
    assert not decoder.idle and decoder.running == 0
    [progress] = decoder.step()
    assert (progress.id, progress.tokens, progress.finish) == (id, (), "cancelled")
    assert decoder.idle


@pytest.mark.parametrize("logits", [mixed, script(2, [10, 11, EOD, 12])])
def test_maximum_and_minimum_of_tokens(logits):
    def run(**values) -> Served:
        decoder = Decoder(FakeModel(config(), logits), ByteTokenizer(), 1)
        [served] = serve(decoder, [Request((1, 2), **({"maximum_tokens": 9} | values))])
        return served

    ends = logits is not mixed
    plain = run()
    assert (len(plain.tokens), plain.finish) == ((3, "stop") if ends else (9, "length"))
    assert (len(run(maximum_tokens=2).tokens), run(maximum_tokens=2).finish) == (2, "length")
    for values in ({"minimum_tokens": 9}, {"ignore_eod": True}):
        served = run(**values)
        assert (len(served.tokens), served.finish) == (9, "length") and EOD not in served.tokens
    assert run(minimum_tokens=2).tokens == plain.tokens
    assert run(minimum_tokens=2, stop=(chr(11),)).text == (chr(10) if ends else plain.text)
    # Later than the third token there is no stop string any more.
    assert run(minimum_tokens=4, stop=(chr(11),)).text.startswith(chr(10) + chr(11)) == ends


def test_other_tokens_end_an_answer_too_and_what_was_held_back_is_told():
    def run(**values) -> Served:
        decoder = Decoder(FakeModel(config(), script(2, [10, 11, 12, 13, EOD])), ByteTokenizer(), 1)
        request = Request((1, 2), 9, stop=(chr(11) + "x",), ends=(12,), **values)
        [served] = serve(decoder, [request])
        return served

    ended = run()
    assert (ended.tokens, ended.text, ended.finish) == ([10, 11, 12], chr(10) + chr(11), "stop")
    assert 12 not in run(ignore_eod=True).tokens and 12 not in run(minimum_tokens=4).tokens[:4]


def test_an_answer_ends_where_nothing_more_fits():
    for max_length, count in ((None, 62), (10, 8)):
        decoder = Decoder(FakeModel(config()), ByteTokenizer(), 1, max_length)
        [served] = serve(decoder, [Request((1, 2), 500)])
        assert (len(served.tokens), served.finish) == (count, "length")
    with pytest.raises(RequestError, match="the prompt has 10 tokens"):
        decoder.submit(Request((1,) * 10, 1))
    assert decoder.idle


@pytest.mark.parametrize(
    "stop, text, count",
    [
        (("d",), "abc", 4),
        (("cd", "zz"), "ab", 4),
        (("é",), "abcd", 6),
        (("é🎈",), "abcd", 10),
        (("🎈",), "abcdé", 10),
        (("cdx",), "abcdé🎈ef", 13),
        (("ef<",), "abcdé🎈ef", 13),
    ],
)
def test_stop_strings_over_several_tokens_and_inside_characters(stop, text, count):
    model = FakeModel(config(), script(1, [*"abcdé🎈ef".encode(), EOD]))
    decoder = Decoder(model, ByteTokenizer(), 1)
    decoder.submit(Request((1,), 40, stop=stop))
    pieces = []
    while not decoder.idle:
        pieces += [progress.text for progress in decoder.step()]
    assert ("".join(pieces), len(pieces)) == (text, count)
    assert all("\ufffd" not in piece for piece in pieces)


def test_log_probabilities_are_the_models_own():
    model = small_model(ProcessGroups.single(), **SHAPE)
    sampling = Sampling(1.7, top_k=5, repetition_penalty=1.5)
    requests = [
        Request((3, 4), 12, sampling=sampling, logprobs=n, logits=True) for n in (0, 4, None, 61)
    ]
    served = serve(Decoder(model, LetterTokenizer(), 4), requests)
    assert served[2].logprobs == []
    for n, one in ((0, served[0]), (4, served[1]), (61, served[3])):
        logprobs_TV = logits_of(one).log_softmax(-1)
        for t, told in enumerate(one.logprobs):
            assert told.token == one.tokens[t]
            assert told.logprob == logprobs_TV[t, told.token].item()
            values, ids = logprobs_TV[t, : LetterTokenizer.vocab_size].topk(n)
            assert told.likeliest == tuple(zip(ids.tolist(), values.tolist(), strict=True))


def test_the_penalty_is_over_prompt_and_answer():
    def hates_repeats(sampling: Sampling) -> list[int]:
        def logits(history: list[int]) -> Tensor:
            return torch.linspace(2.0, 1.0, VOCABULARY)

        decoder = Decoder(FakeModel(config(), logits), ByteTokenizer(), 1)
        return serve(decoder, [Request((0, 2), 4, sampling=sampling)])[0].tokens

    assert hates_repeats(Sampling()) == [0, 0, 0, 0]
    assert hates_repeats(Sampling(repetition_penalty=1.9)) == [1, 3, 4, 5]


def test_a_seed_means_the_same_alone_and_in_a_batch():
    def texts(requests: list[Request], rows: int) -> list[str]:
        decoder = Decoder(FakeModel(config()), ByteTokenizer(), rows)
        return [served.text for served in serve(decoder, requests)]

    request = Request((1, 2, 3), 10, sampling=Sampling(1.0), seed=5)
    others = [replace(request, seed=i) for i in range(5)]
    [alone] = texts([request], 1)
    assert texts([*others, request], 3)[-1] == texts([request, *others], 6)[0] == alone
    assert len({alone, *texts(others, 2)}) == 6
    assert texts([replace(request, seed=5 + 2**64)], 1) == [alone]


def test_logits_that_are_no_numbers_end_their_own_request_only():
    def some_bad(history: list[int]) -> Tensor:
        bad = history[0] == 9 and len(history) == 10
        return torch.full((VOCABULARY,), float("nan")) if bad else mixed(history)

    requests = [Request((1, 2), 6), Request((9,) * 8, 6), Request((1, 3), 6)]
    model = FakeModel(config(), some_bad)
    decoder = Decoder(model, ByteTokenizer(), 3, chunk=4)
    served = serve(decoder, requests)
    assert [one.finish for one in served] == ["length", "error", "length"]
    assert len(served[1].tokens) == 2
    assert "logits after 10 tokens are not finite numbers" in served[1].message
    assert "precision: fp32" in served[1].message
    before = len(model.shapes)
    serve(decoder, [Request((9,) * 8, 1)])
    assert model.shapes[before:] == [(1, 4), (1, 4)], "nothing of a bad row is shared"


def test_adapters_have_passes_of_their_own_and_share_no_prompts():
    passes = []

    class Adapted(FakeModel):
        def __call__(self, tokens_BS, cache=None, *, logits="all"):
            passes.append((self.selected, tuple(tokens_BS.shape)))
            return super().__call__(tokens_BS, cache, logits=logits)

    decoder = Decoder(Adapted(config()), ByteTokenizer(), 4, chunk=4)
    names = ["a", None, "b", "a"]
    serve(decoder, [Request((1, 2, 3, 4, 5), 2, adapter=name) for name in names])
    assert passes == [
        ("a", (1, 4)),
        (None, (1, 4)),
        ("b", (1, 4)),
        # First tokens, of the second "a" before the first's: it has taken over the chunk.
        ("a", (1, 1)), ("a", (1, 1)), (None, (1, 1)), ("b", (1, 1)),
        ("a", (2, 1)), (None, (1, 1)), ("b", (1, 1)),
    ]  # fmt: skip
    with pytest.raises(RequestError, match="no adapter 'c'"):
        decoder.submit(Request((1,), 2, adapter="c"))


def test_a_model_without_adapters_refuses_their_names():
    model = small_model(ProcessGroups.single(), **SHAPE)
    with pytest.raises(RequestError, match="no adapter 'mine' here; those that were loaded: none"):
        Decoder(model, LetterTokenizer(), 1).submit(Request((1,), 2, adapter="mine"))


def test_many_requests_are_asked_for_as_rows_become_free():
    begun = []
    model = FakeModel(config())
    requests = [Request((i,), 1 + i) for i in range(5)]
    ended = []
    for number, progress in decode_all(model, ByteTokenizer(), requests, 2, begun.append):
        if progress.finish is not None:
            ended.append(number)
            assert len(begun) <= len(ended) + 2
    assert begun == [0, 1, 2, 3, 4] and sorted(ended) == begun
    assert list(decode_all(model, ByteTokenizer(), [], 2)) == []
