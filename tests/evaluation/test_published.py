"""Published figures: which model a configuration is, and when a score agrees."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from neox.config import NeoXConfig, Override, load_config
from neox.evaluation import published
from neox.evaluation.published import MODELS, Comparison, Published

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {
    "GPT-NeoX-20B": "20B.yml",
    "GPT-J-6B": "gpt-j-6B.yml",
    "pythia-70m": "pythia/70M.yml",
    "pythia-160m": "pythia/160M.yml",
    "pythia-410m": "pythia/410M.yml",
    "pythia-1b": "pythia/1B.yml",
    "pythia-1.4b": "pythia/1-4B.yml",
    "pythia-2.8b": "pythia/2-8B.yml",
    "pythia-6.9b": "pythia/6-9B.yml",
    "pythia-12b": "pythia/12B.yml",
}


def load(file: str, **values: Any) -> NeoXConfig:
    whole = file in ("20B.yml", "gpt-j-6B.yml")  # these name data and folders themselves
    return load_config(
        [Path(file)] if whole else [Path(file), Path("local_setup.yml")],
        {key: Override(value, "--set") for key, value in values.items()},
        conf_dir=CONFIGS,
        purpose="evaluate",
        check_files=False,
    )


def named(name: str) -> Published:
    (model,) = (model for model in MODELS if model.name == name)
    return model


@pytest.mark.parametrize("name", [m.name for m in MODELS])
def test_each_model_is_found_by_its_configuration_and_its_folder_s_name(name: str) -> None:
    model = named(name)
    config = load(FILES[name.removesuffix("-deduped")], load=f"weights/{name}/main")
    for iteration in (model.iteration, None, 0):
        assert published.find(config, iteration) is model
    for iteration in (1, model.iteration - 1000, 512):
        assert published.find(config, iteration) is None


def test_gpt_j_is_the_one_whose_norm_is_shared() -> None:
    shape = {"num_layers": 28, "hidden_size": 4096, "num_attention_heads": 16}
    config = load("pythia/6-9B.yml", **shape, gpt_j_tied=True)
    assert published.find(config, 383500) is named("GPT-J-6B")
    assert published.find(config, 143000) is None
    assert published.find(load("pythia/6-9B.yml", **shape), 383500) is None
    assert published.find(load("pythia/6-9B.yml", gpt_j_tied=True), 143000) is None


@pytest.mark.parametrize(
    "other",
    [
        {"num_attention_heads": 4},
        {"num_layers": 7},
        {"hidden_size": 1024},
        {"rotary_pct": 1.0},
        {"pos_emb": "learned"},
        {"gpt_j_residual": False},
        {"no_weight_tying": False},
        {"norm": "rmsnorm"},
        {"activation": "swiglu"},
        {"num_kv_heads": 2},
        {"intermediate_size": 1024},
    ],
)
def test_another_architecture_is_no_known_model(other: dict[str, Any]) -> None:
    assert published.find(load("pythia/70M.yml"), 143000) is named("pythia-70m")
    assert published.find(load("pythia/70M.yml", **other), 143000) is None


@pytest.mark.parametrize("file", ["pythia/14M.yml", "pythia/31M.yml", "125M.yml", "6-7B.yml"])
def test_models_without_published_figures(file: str) -> None:
    assert published.find(load(file), None) is None


def test_the_folder_chooses_between_two_of_one_shape(tmp_path, monkeypatch) -> None:
    (tmp_path / "Pythia-70M-Deduped").mkdir()
    (tmp_path / "link").symlink_to("Pythia-70M-Deduped")
    monkeypatch.chdir(tmp_path / "Pythia-70M-Deduped")
    for path in (".", "../link", str(tmp_path / "link"), "models--pythia-70m-deduped/snapshots/1"):
        assert published.find(load("pythia/70M.yml", load=path), None) is named(
            "pythia-70m-deduped"
        )
    monkeypatch.chdir(tmp_path)
    for path in (".", "pythia-70m"):
        assert published.find(load("pythia/70M.yml", load=path), None) is named("pythia-70m")
    # One of a kind is itself, whatever its folder is called.
    config = load("20B.yml", load="dedup")
    assert published.find(config, 150000) is named("GPT-NeoX-20B")


def test_the_table_s_figures_are_complete_and_as_wide_as_published() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS) == 18
    counts = Counter(model.shape for model in MODELS)
    for model in MODELS:
        assert counts[model.shape] == (2 if "pythia" in model.name else 1)
        metrics = {("lambada_openai", "acc"), ("lambada_openai", "perplexity"), ("piqa", "acc")}
        if model.name == "GPT-J-6B":
            assert set(model.figures) == metrics
            continue
        assert set(model.figures) == metrics | {("piqa", "acc_norm")}
        for (_, metric), figure in model.figures.items():
            digits = r"\d+\.\d{3}" if metric == "perplexity" else r"0\.\d{4}"
            assert re.fullmatch(digits, figure), (model.name, metric, figure)


def test_a_deduped_sister_has_its_plain_one_s_shape() -> None:
    for model in MODELS:
        if model.name.endswith("-deduped"):
            assert model.shape == named(model.name.removesuffix("-deduped")).shape


# Standard errors as lm-eval gives them: sqrt(p (1 - p) / (n - 1)).
LAMBADA = math.sqrt(0.7209 * 0.2791 / 5152)


@pytest.mark.parametrize(
    ("name", "task", "metric", "value", "stderr", "expected"),
    [
        ("GPT-NeoX-20B", "lambada_openai", "acc", 0.7209, 0.006, ("0.7209", True, 0.0)),
        ("GPT-NeoX-20B", "lambada_openai", "acc", 0.7224, LAMBADA, ("0.7209", True, 0.24)),
        ("GPT-NeoX-20B", "lambada_openai", "acc", 0.71, LAMBADA, ("0.7209", False, 1.745)),
        ("GPT-NeoX-20B", "lambada_openai", "perplexity", 3.747, 0.075, ("3.672", True, 1.0)),
        # The standard error and half of the fourth digit, 0.00005, and not a bit more.
        ("GPT-NeoX-20B", "piqa", "acc", 0.78425, 0.01, ("0.7742", True, 1.005)),
        ("GPT-NeoX-20B", "piqa", "acc", 0.76415, 0.01, ("0.7742", True, 1.005)),
        ("GPT-NeoX-20B", "piqa", "acc", 0.78426, 0.01, ("0.7742", False, 1.006)),
        ("GPT-NeoX-20B", "piqa", "acc", 0.76414, 0.01, ("0.7742", False, 1.006)),
        # Three digits say less: half of the last is 0.0005. Of 3.99 it is 0.005.
        ("GPT-J-6B", "piqa", "acc", 0.7655, None, ("0.765", True, None)),
        ("GPT-J-6B", "piqa", "acc", 0.7645, 0.0, ("0.765", True, None)),
        ("GPT-J-6B", "piqa", "acc", 0.76551, None, ("0.765", False, None)),
        ("GPT-J-6B", "lambada_openai", "perplexity", 3.985, None, ("3.99", True, None)),
        ("GPT-J-6B", "lambada_openai", "perplexity", 3.984, None, ("3.99", False, None)),
        ("pythia-1b", "lambada_openai", "acc", 0.562, 0.007, ("0.5620", True, 0.0)),
    ],
)
def test_agreement(name, task, metric, value, stderr, expected) -> None:
    comparison = published.compare(named(name), task, metric, value, stderr)
    assert comparison is not None
    assert comparison[:2] == expected[:2]
    distance = expected[2]
    assert comparison.distance == (distance and pytest.approx(distance, abs=1e-3))


def test_what_is_no_number_agrees_with_nothing() -> None:
    comparison = published.compare(named("pythia-70m"), "piqa", "acc", math.nan, None)
    assert comparison == Comparison("0.5947", False, None)


def test_figures_that_nobody_published() -> None:
    assert published.compare(named("GPT-J-6B"), "piqa", "acc_norm", 0.76, 0.01) is None
    assert published.compare(named("GPT-J-6B"), "hellaswag", "acc", 0.66, 0.005) is None
