"""Training by epochs on packed, labelled, blended data, from the command line; and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from tests import scripts
from tests.data.datasets import write_dataset, write_labels
from tests.world import World

DEEPY = Path(__file__).parents[2] / "deepy.py"
SPLITS = ("train", "valid", "test")


def write_config(folder: Path) -> None:
    for n, name in enumerate("ab"):
        lengths = np.random.default_rng(n).integers(2, 16, size=30).tolist()
        texts = write_dataset(folder / name, lengths, modulo=250)
        write_labels(folder / f"{name}_label", texts, [np.arange(k) % 3 > 0 for k in lengths])
    values = {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "seq_length": 16,
        "max_position_embeddings": 16,
        "tokenizer_type": "CharLevelTokenizer",
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "lr_decay_fraction": 0.5,
        "train_epochs": 2,
        "train_batch_size": 4,
        "pack_impl": "pack_until_overflow",
        "eval_interval": 4,
        "eval_iters": 1,
        "log_interval": 1,
        "log_dir": "logs",
        "save": "checkpoints",
        "load": "checkpoints",
        "checkpoint_factor": 2,
    }
    for split in SPLITS:
        values[f"{split}_data_paths"] = ["a", "b"]
        values[f"{split}_label_data_paths"] = ["a_label", "b_label"]
    (folder / "a.yml").write_text(yaml.safe_dump(values))


def train(world: World, folder: Path, *words: str) -> tuple[str, dict[int, float]]:
    """What was said, and the loss of every step so far."""
    run = scripts.run(world, DEEPY, "train.py", "a.yml", *words, cwd=folder)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(row) for row in (folder / "logs/metrics.jsonl").read_text().splitlines()]
    losses = {row["iteration"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}
    return run.stdout + run.stderr, losses


def test_epochs_of_labelled_packs_resumed_at_another_grid(world: World, tmp_path: Path) -> None:
    write_config(tmp_path)
    said, expected = train(world, tmp_path, "--set", "num_gpus=1")
    assert "warning" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("train_epochs 2:")]
    iterations = int(line.split("train_iters ")[1].split()[0])
    samples = int(line.split(" = ")[1].split()[0])
    assert iterations == samples * 2 // 4 == len(expected)
    assert 0 < expected[iterations] < expected[1]

    latest = tmp_path / "checkpoints/latest"
    latest.write_text("global_step4")
    said, losses = train(
        world, tmp_path, "--set", "num_gpus=2", "--set", "train_micro_batch_size_per_gpu=2"
    )
    assert "resuming" in said and "the training data" not in said
    # Two micro-batches of 2 weigh alike, however many labels each has: hence 2 % and not 1e-5.
    assert losses.keys() == expected.keys()
    assert np.allclose(list(losses.values()), list(expected.values()), rtol=0.02)

    # Other data under the same names: told, once, and the run goes on.
    latest.write_text("global_step4")
    texts = write_dataset(tmp_path / "b", [3] * 60, modulo=250)
    write_labels(tmp_path / "b_label", texts, [np.ones(3)] * 60)
    said, _ = train(world, tmp_path, "--set", "num_gpus=1", "--set", "exit_interval=6")
    assert said.count("is not the one that the checkpoint was trained on") == 1
    assert "data.datasets[1].text" in said
