"""Token ids and dataset files against those that upstream made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from neox.config import from_dict
from neox.data.loaders import build_loaders
from neox.data.preprocess import preprocess
from neox.data.recipes import TextRecipe
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import load_tokenizer
from tests.conformance.small import small_config
from tests.data.datasets import Replica


def test_batches_equal_upstreams_bit_for_bit(shared: Path, tmp_path: Path) -> None:
    upstream = shared / "upstream"
    for file in (upstream / "data").glob("topics_text_document.*"):
        shutil.copyfile(file, tmp_path / file.name)
    data_path = str(tmp_path / "topics_text_document")
    config = from_dict({**small_config(upstream), "data_path": data_path})
    loaders = build_loaders(config, ProcessGroups.single(), 0, eod=0, vocab_size=1100)
    expected = np.load(upstream / "batches/small_dp0of1.npz", allow_pickle=False)
    assert set(expected) == {"train", "valid", "test"}
    for name, loader in loaders._asdict().items():
        for row in expected[name]:
            batch = next(loader)
            assert np.array_equal(batch.tokens_BS, row[:, :-1])
            assert np.array_equal(batch.labels_BS, row[:, 1:])
            assert torch.equal(batch.loss_mask_BS, torch.ones(4, 128))


@pytest.mark.parametrize(("dp", "micro", "first"), [(2, 4, 0), (2, 1, 7), (4, 2, 13), (1, 8, 19)])
def test_every_grid_reads_upstreams_batches_wherever_it_starts(
    shared: Path, tmp_path: Path, dp: int, micro: int, first: int
) -> None:
    """The 8 samples of each of upstream's 20 steps, read by other replicas and micro-batches."""
    upstream = shared / "upstream"
    for file in (upstream / "data").glob("topics_text_document.*"):
        shutil.copyfile(file, tmp_path / file.name)
    values = small_config(upstream) | {
        "data_path": str(tmp_path / "topics_text_document"),
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 8 // (dp * micro),
    }
    config = from_dict(values, world_size=dp)
    expected = np.load(upstream / "batches/small_dp0of1.npz", allow_pickle=False)
    ranks = [build_loaders(config, Replica.of(rank, dp), first, eod=0) for rank in range(dp)]
    for step in range(first, 20):
        read = [
            next(loaders.train).tokens_BS.numpy()
            for _ in range(config.gradient_accumulation_steps)
            for loaders in ranks
        ]
        rows = expected["train"][2 * step : 2 * step + 2].reshape(8, 129)
        assert np.array_equal(np.concatenate(read), rows[:, :-1])


@pytest.mark.parametrize("workers", [1, 2])
def test_files_equal_upstreams_byte_for_byte(shared: Path, tmp_path: Path, workers: int) -> None:
    upstream = shared / "upstream"
    tokenizer = load_tokenizer("HFTokenizer", str(upstream / "tok/small_tokenizer.json"))
    source = upstream / "data/input.jsonl"
    recipe = TextRecipe(tokenizer, append_eod=True)
    preprocess([source], tmp_path / "topics", recipe, workers=workers)
    for ending in ("bin", "idx"):
        name = f"topics_text_document.{ending}"
        assert (tmp_path / name).read_bytes() == (upstream / "data" / name).read_bytes()


@pytest.mark.parametrize("name", ["20B_tokenizer.json", "gpt2_tokenizer.json"])
def test_real_tokenizers_round_trip(shared: Path, name: str) -> None:
    tokenizer = load_tokenizer("HFTokenizer", str(shared / "data" / name))
    lines = (shared / "data/lambada/lambada_test.jsonl").read_text().splitlines()
    for line in lines[:500]:
        text = json.loads(line)["text"]
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_gpt2_from_vocabulary_and_merges(shared: Path, tmp_path: Path) -> None:
    whole = shared / "data/gpt2_tokenizer.json"
    model = json.loads(whole.read_text())["model"]
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    merges.write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    separate = load_tokenizer("GPT2BPETokenizer", str(vocab), str(merges))
    one_file = load_tokenizer("HFTokenizer", str(whole))
    assert (separate.vocab_size, separate.eod) == (50257, 50256)
    for line in (shared / "upstream/data/input.jsonl").read_text().splitlines():
        text = json.loads(line)["text"] + "<|endoftext|>"
        assert separate.tokenize(text) == one_file.tokenize(text)
