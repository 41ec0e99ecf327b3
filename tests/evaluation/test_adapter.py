"""Scores and texts from lm-eval's interface against counting one token after another."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from neox.errors import CheckpointError, ConfigError
from neox.evaluation.adapter import NeoXLM
from neox.evaluation.scoring import NotFiniteError
from neox.inference.stages import InferenceModel
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.tokenizer import Tokenizer
from tests.evaluation import models
from tests.evaluation.models import SEQ_LENGTH

TEXT = "the age of wisdom, it was the age of foolishness, it was the epoch of belief, "

PAIRS = [
    ("It was the best", " of times"),
    ("It was the best", " of wisdom"),
    ("It was ", "the worst"),
    ("It was\n\n", "the worst of times"),
    ("", "it was the age"),
    ("   ", "it was"),
    (TEXT * 3, "it was the winter of despair"),
    ("x", TEXT[:40]),
    ("It", " was"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return models.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model() -> InferenceModel:
    return models.random_model()


def adapter(model: Any, tokenizer: Tokenizer, batch_size: int | None = 4) -> NeoXLM:
    return NeoXLM(
        lambda: model,
        tokenizer,
        model.groups,
        model.config.seq_length,
        batch_size=batch_size,
        seed=1234,
    )


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def score(lm: NeoXLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood(instances("loglikelihood", pairs))


def one_by_one(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition: each token after everything before it that fits, a forward pass for each."""
    total, greedy = 0.0, True
    tokens = context + continuation
    first = max(0, len(tokens) - 1 - SEQ_LENGTH)  # what no pass may see
    for i in range(len(context), len(tokens)):
        logits = model(torch.tensor([tokens[first:i]]))[0, -1].double()
        total += float(logits.log_softmax(-1)[tokens[i]])
        greedy = greedy and int(logits.argmax()) == tokens[i]
    return total, greedy


def test_scores_are_those_of_one_token_after_another(model, tokenizer):
    lm = adapter(model, tokenizer)
    for pair, (got, greedy) in zip(PAIRS, score(lm, PAIRS), strict=True):
        expected, expected_greedy = one_by_one(model, *lm.encode_pair(*pair))
        assert got == pytest.approx(expected, abs=1e-4), pair
        assert greedy is expected_greedy, pair


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100, None])
def test_scores_do_not_depend_on_the_batch_size(model, tokenizer, batch_size):
    expected = score(adapter(model, tokenizer, 4), PAIRS)
    got = score(adapter(model, tokenizer, batch_size), PAIRS)
    assert [s for s, _ in got] == pytest.approx([s for s, _ in expected], abs=1e-5)
    assert [g for _, g in got] == [g for _, g in expected]


def test_the_greedy_continuation_is_called_greedy(model, tokenizer):
    lm = adapter(model, tokenizer)
    tokens = tokenizer.tokenize("It was")
    prompt = len(tokens)
    for _ in range(5):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 280]
    pairs = [(tokens[:prompt], tokens[prompt:]), (other[:prompt], other[prompt:])]
    assert [greedy for _, greedy in lm._score(pairs, ["a", "b"])] == [True, False]


@pytest.mark.parametrize(
    "context, continuation, expected",
    [
        ("It was", " the", ("It was", " the")),
        ("It was ", "the", ("It was", " the")),
        ("It was\n ", "the", ("It was", "\n the")),
        ("It was", "", ("It was", "")),
    ],
)
def test_space_at_the_end_of_a_context_moves_to_the_continuation(
    model, tokenizer, context, continuation, expected
):
    got = adapter(model, tokenizer).encode_pair(context, continuation)
    assert tuple(map(tokenizer.detokenize, got)) == expected


def test_the_context_s_tokens_are_its_own(model, tokenizer):
    """A continuation that merges with the context's last letters keeps only what is left."""
    whole, context = tokenizer.tokenize("the times"), tokenizer.tokenize("the ti")
    assert whole[: len(context)] != context  # else there is nothing to see here
    got = adapter(model, tokenizer).encode_pair("the ti", "mes")
    assert got == (context, whole[len(context) :])


@pytest.mark.parametrize("context", ["", "  ", "\n"])
def test_before_an_empty_context_stands_the_end_of_a_document(model, tokenizer, context):
    got = adapter(model, tokenizer).encode_pair(context, "it was")
    assert got == ([tokenizer.eod], tokenizer.tokenize(context + "it was"))


def test_end_of_document_is_not_doubled(model, tokenizer):
    got = adapter(model, tokenizer).encode_pair("", "<|endoftext|>it was")
    assert got == ([tokenizer.eod], tokenizer.tokenize("it was"))


def test_nothing_follows_with_certainty(model, tokenizer):
    assert score(adapter(model, tokenizer), [("It was", ""), ("", "")]) == [(0.0, True)] * 2


def test_long_contexts_lose_their_beginning(tokenizer):
    model = models.FromTransformers(lambda tokens: None)
    model.logits = lambda tokens_BS: torch.zeros(*tokens_BS.shape, models.VOCABULARY)
    lm = adapter(model, tokenizer)
    context, continuation = lm.encode_pair(TEXT * 3, " it was")
    [(total, _)] = score(lm, [(TEXT * 3, " it was")])
    assert model.rows == [(context + continuation)[-SEQ_LENGTH - 1 : -1]]
    assert total == pytest.approx(-len(continuation) * math.log(models.VOCABULARY))


def test_equal_inputs_are_computed_once_and_score_exactly_the_same(model, tokenizer):
    class Counting(models.Stateless):
        logits = staticmethod(model.__call__)

    counting = Counting()
    pairs = [("It was the", " x"), ("It was the", " y"), ("He had the best of all", " the")] * 5
    got = score(adapter(counting, tokenizer, 2), pairs)
    assert len(counting.rows) == 2
    assert got == got[:3] * 5


def test_a_continuation_longer_than_the_model_can_see_is_scored_in_pieces(model, tokenizer):
    lm = adapter(model, tokenizer)
    [(got, greedy)] = score(lm, [("It was", TEXT * 4)])
    context, continuation = lm.encode_pair("It was", TEXT * 4)
    assert len(continuation) > 3 * SEQ_LENGTH
    expected = 0.0
    while continuation:
        piece, continuation = continuation[:SEQ_LENGTH], continuation[SEQ_LENGTH:]
        expected += one_by_one(model, context, piece)[0]
        context = context + piece
    assert got == pytest.approx(expected, abs=1e-3)
    assert greedy is False


def test_logits_that_are_no_numbers_are_not_scored(tokenizer):
    model = models.Stateless()
    model.logits = lambda tokens_BS: torch.full((*tokens_BS.shape, models.VOCABULARY), math.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        score(adapter(model, tokenizer), PAIRS)


def rolling(lm: NeoXLM, texts: list[str]) -> list[float]:
    return lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))


def test_rolling_scores_the_text_as_a_document(model, tokenizer):
    texts = ["It was the best of times", "", TEXT * 4]
    lm = adapter(model, tokenizer)
    expected = [one_by_one(model, [tokenizer.eod], tokenizer.tokenize(texts[0]))[0], 0.0]
    expected += [score(lm, [("", texts[2])])[0][0]]
    assert rolling(lm, texts) == pytest.approx(expected, abs=1e-4)


def generate(lm: NeoXLM, context: str, **options: Any) -> str:
    [text] = lm.generate_until(instances("generate_until", [(context, options)]))
    return text


@pytest.fixture
def wise(tokenizer) -> NeoXLM:
    """Writes on whatever begins as this text does; at its end, the end of the document."""
    text = tokenizer.tokenize("Question: why? Answer: because.\nQuestion: who?")
    settings = models.config(seq_length=128, max_position_embeddings=128)
    return adapter(models.Wise([[*text, tokenizer.eod]], settings), tokenizer)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"until": ["\n"]}, " because."),
        ({"until": "\n"}, " because."),
        ({"until": ["Question", "cause", "nowhere"]}, " be"),
        ({"until": []}, " because.\nQuestion: who?"),
        ({}, " because.\nQuestion: who?"),
        ({"until": ["\n"], "do_sample": True, "temperature": 0.5, "num_beams": 1}, " because."),
        ({"until": ["\n"], "do_sample": True, "top_k": 1}, " because."),
    ],
)
def test_generation_ends_before_a_stop_string_or_with_the_document(wise, options, expected):
    assert generate(wise, "Question: why? Answer:", max_gen_toks=30, **options) == expected


def test_generation_ends_after_max_gen_toks(wise, tokenizer):
    text = generate(wise, "Question: why? Answer:", max_gen_toks=3, until=["\n"])
    assert len(tokenizer.tokenize(text)) == 3
    assert len(wise.model.rows) == 3


def test_generation_stops_computing_at_the_stop_string(wise, tokenizer):
    generate(wise, "Question: why? Answer:", max_gen_toks=30, until=["because"])
    assert len(wise.model.rows) == len(tokenizer.tokenize(" because"))


def test_generation_leaves_room_for_max_gen_toks(tokenizer):
    model = models.Wise([])
    generate(adapter(model, tokenizer), TEXT * 3, max_gen_toks=8, until=["\n"])
    assert model.rows[0] == tokenizer.tokenize(TEXT * 3)[-(SEQ_LENGTH - 8) :]


def test_generation_without_room_is_refused(wise):
    with pytest.raises(ConfigError, match="max_gen_toks is 128, which leaves no room"):
        generate(wise, "Question", max_gen_toks=128)


def test_unknown_generation_options_are_refused(wise):
    with pytest.raises(ConfigError, match=r"ask for \{'num_beams': 4\}; known here are until"):
        generate(wise, "Question", max_gen_toks=4, num_beams=4)


def test_texts_do_not_depend_on_what_is_written_together(model, tokenizer):
    contexts = ["It was", TEXT, "the", "", "wisdom, it", "was the age of"]
    options = {"max_gen_toks": 12, "until": ["e", "\n"]}
    asked = [(context, options | {"max_gen_toks": 5 + i}) for i, context in enumerate(contexts)]
    together = adapter(model, tokenizer, None).generate_until(instances("generate_until", asked))
    for (context, own), text in zip(asked, together, strict=True):
        assert generate(adapter(model, tokenizer, 1), context, **own) == text


def test_texts_of_a_model_that_computes_no_numbers_are_an_error(tokenizer):
    def logits(tokens_BS: torch.Tensor) -> torch.Tensor:
        """Of no numbers after this text only."""
        bad = tokens_BS[0, : len(text)].tolist() == text
        return torch.full((*tokens_BS.shape, models.VOCABULARY), math.nan if bad else 1.0)

    text = tokenizer.tokenize("wisdom")
    for together in (False, True):
        model = models.Wise([])
        model.logits = logits
        lm = adapter(model, tokenizer)
        lm.together = together
        with pytest.raises(NotFiniteError, match="tokens are not finite numbers"):
            lm.generate_until(
                instances("generate_until", [(c, {"max_gen_toks": 3}) for c in ("It", "wisdom")])
            )


def sampled(lm: NeoXLM) -> list[str]:
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []}
    return lm.generate_until(instances("generate_until", [("It was", options)] * 3))


def test_samples_follow_the_seed_and_differ_between_requests(model, tokenizer):
    texts = sampled(adapter(model, tokenizer))
    assert len(set(texts)) == 3
    assert texts == sampled(adapter(model, tokenizer))


class CountingRandom(models.Stateless):
    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups = groups
        self.model = models.random_model()

    def logits(self, tokens_BS):
        return self.model(tokens_BS)


def on_replicas(rank: int, tokenizer_folder: Any) -> tuple[Any, Any, Any, int]:
    groups = initialize(Topology(dp=2), "gloo", torch.device("cpu"))
    model = CountingRandom(groups)
    lm = adapter(model, models.tokenizer(tokenizer_folder / str(rank)))
    scores = score(lm, PAIRS)
    rows = len(model.rows)
    return scores, rolling(lm, [TEXT * 2, "It was"]), sampled(lm), rows


def test_replicas_share_the_work_and_the_answers(world, model, tokenizer, tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    (first, first_rolling, first_texts, rows0), (*second, rows1) = world.run(
        2, on_replicas, tmp_path
    )
    assert [first, first_rolling, first_texts] == second
    assert rows0 + rows1 <= len(PAIRS) and min(rows0, rows1) >= 3
    lm = adapter(model, tokenizer)
    expected = score(lm, PAIRS)
    assert [s for s, _ in first] == pytest.approx([s for s, _ in expected], abs=1e-5)
    assert [g for _, g in first] == [g for _, g in expected]
    assert first_rolling == pytest.approx(rolling(lm, [TEXT * 2, "It was"]), abs=1e-4)
    assert first_texts == sampled(lm)
