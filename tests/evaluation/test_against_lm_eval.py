"""The same weights and tokenizer behind lm-eval's own HF backend: the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from neox.evaluation.adapter import NeoXLM
from neox.evaluation.results import tracker_metrics
from neox.evaluation.run import evaluate
from neox.evaluation.tasks import load_tasks
from neox.parallel.groups import ProcessGroups
from tests import small_tokenizer
from tests.evaluation import models

DEMO = Path(__file__).parents[2] / "configs" / "demo_eval"
SEQ_LENGTH = 96  # so that some of the demo's documents are too long
SETTINGS = {"seq_length": SEQ_LENGTH, "max_position_embeddings": SEQ_LENGTH}


@pytest.fixture(scope="module")
def gpt_neox() -> Any:
    torch.manual_seed(1)
    model = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=models.VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=SEQ_LENGTH,
            initializer_range=0.2,
        )
    )
    # The rows of the vocabulary's padding stand for no token, and ours never generates one.
    model.generation_config.suppress_tokens = list(range(280, models.VOCABULARY))
    return model.eval()


@pytest.fixture(scope="module")
def theirs(gpt_neox: Any, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    path = small_tokenizer.write(tmp_path_factory.mktemp("hf"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token="<|endoftext|>", pad_token="<|padding|>"
    )
    # Its cache is wrong where one text is split at several places: it sets a shorter continuation's
    # tokens against a longer one's first logits.
    return HFLM(
        pretrained=gpt_neox, tokenizer=tokenizer, batch_size=3, device="cpu", logits_cache=False
    )


@pytest.fixture(scope="module")
def ours(gpt_neox: Any, tmp_path_factory: pytest.TempPathFactory) -> NeoXLM:
    model = models.FromTransformers(gpt_neox, models.config(**SETTINGS))
    tokenizer = models.tokenizer(tmp_path_factory.mktemp("ours"))
    return NeoXLM(lambda: model, tokenizer, model.groups, SEQ_LENGTH, batch_size=2, seed=1234)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


TEXTS = [
    "It was the best of times",
    "it was the age of foolishness, it was the epoch of belief " * 6,
    "naïve 日本語 \n\n two  spaces\tand a tab ",
    " ",
]


def test_loglikelihood(ours, theirs):
    pairs = [(text[:cut], text[cut:][:40]) for text in TEXTS[:3] for cut in (0, 1, 6, 7, 8, 15)]
    pairs += [("Question: why?\nAnswer: ", "because"), ("Question: why?\nAnswer:", " because")]
    pairs += [(TEXTS[1], "it was the epoch of incredulity")]
    requests = instances("loglikelihood", pairs)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for pair, (score, greedy), (their_score, their_greedy) in zip(
        pairs, ours.loglikelihood(requests), expected, strict=True
    ):
        assert score == pytest.approx(their_score, rel=1e-5), pair
        assert greedy is their_greedy, pair


def test_loglikelihood_rolling(ours, theirs):
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)


def test_generate_until(ours, theirs):
    arguments = [
        (text, {"until": until, "max_gen_toks": 24, "do_sample": False})
        for text in TEXTS[:3]
        for until in ([], ["o"], ["8", " t"])
    ]
    requests = instances("generate_until", arguments)
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_scores_of_tasks(ours, theirs, tmp_path, num_fewshot):
    for name in ("valid.jsonl", "valid-labels.lst"):
        for copy in (name, name.replace("valid", "train")):
            (tmp_path / copy).write_bytes((DEMO / "piqa" / name).read_bytes())
    lambada = DEMO / "lambada" / "lambada_test.jsonl"
    (tmp_path / lambada.name).write_bytes(lambada.read_bytes())
    settings = models.config(
        **SETTINGS,
        eval_tasks=["lambada", "piqa"],
        eval_data_dir=str(tmp_path),
        eval_own_documents=True,
        num_fewshot=num_fewshot,
    )
    got = evaluate(settings, lambda: ours.model, ours.tokenizer, ProcessGroups.single())
    tasks = load_tasks(settings)
    expected = evaluator.evaluate(theirs, tasks, bootstrap_iters=10_000)
    assert got["n_docs"] == {"lambada_openai": 40, "piqa": 40}
    assert got["n-shot"] == {"lambada_openai": num_fewshot, "piqa": num_fewshot}
    assert len(tracker_metrics(expected)) == 8
    assert tracker_metrics(got) == pytest.approx(tracker_metrics(expected), rel=1e-5)
