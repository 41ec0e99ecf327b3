"""From texts to a fine-tuned model in one command; resumed, and at another grid."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests import small_tokenizer

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
MODEL = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "tokenizer_type": "HFTokenizer",
    "vocab_file": "tokenizer.json",
    "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
    "finetune_data": ["texts/*.txt", "chats.jsonl", "questions.jsonl"],
    "finetune_valid_data": "held_out.txt",
    "train_epochs": 3,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "eval_interval": 6,
    "log_interval": 1,
    "log_dir": "logs",
    "save": "checkpoints",
    "load": "checkpoints",
    "checkpoint_factor": 5,
}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_tokenizer.write(tmp_path)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a.yml").write_text(yaml.safe_dump(MODEL))
    (tmp_path / "texts").mkdir()
    lines = ["It was the best of times", "it was the worst of times", "the age of wisdom"]
    for n in range(4):
        (tmp_path / f"texts/{n}.txt").write_text("\n\n".join(lines) + "\n")
    (tmp_path / "held_out.txt").write_text("the age of foolishness\n")

    def write(name: str, record: dict) -> None:
        (tmp_path / name).write_text(f"{json.dumps(record)}\n" * 4)

    write("questions.jsonl", {"prompt": "the best?", "completion": " of times"})
    turns = [{"role": "user", "content": "age"}, {"role": "assistant", "content": "wisdom"}]
    write("chats.jsonl", {"messages": turns})
    return tmp_path


def run(folder: Path, *words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def train(folder: Path, *overrides: str) -> tuple[str, dict[int, float]]:
    """What was said, and the loss of every step so far."""
    flags = [word for override in overrides for word in ("--set", override)]
    done = run(folder, REPOSITORY / "deepy.py", "train.py", "a.yml", *flags)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (folder / "logs/metrics.jsonl").read_text().splitlines()]
    losses = {row["iteration"]: row["train/lm_loss"] for row in rows if "train/lm_loss" in row}
    return done.stdout + done.stderr, losses


def test_texts_become_a_model(folder: Path) -> None:
    said, expected = train(folder, "num_gpus=1")
    assert "warning" not in said
    assert "finetune_data: 20 examples in 6 files, and 8 empty: " in said
    assert "finetune_valid_data: 1 example in 1 file: " in said
    assert "finetune_data: 20 samples, 5 steps an epoch (train_batch_size 4)" in said
    assert "train_epochs 3: train_iters 15 = 20 samples x 3 / train_batch_size 4" in said
    assert "validation results at iteration 6 " in said
    losses = list(expected.values())
    assert list(expected) == list(range(1, 16))
    assert np.mean(losses[-3:]) < 0.6 * losses[0]

    # Resumed from the fifth step: the same losses to the last bit, and nothing tokenized anew.
    latest = folder / "checkpoints/latest"
    latest.write_text("global_step5")
    said, again = train(folder, "num_gpus=1")
    assert "finetune_data: tokenized before, in texts/finetune_cache\n" in said
    assert "tokenizing" not in said and "resuming" in said and "warning" not in said
    assert again == expected

    # By two processes, which have a micro-batch each instead of both after one another.
    latest.write_text("global_step5")
    said, two = train(folder, "num_gpus=2", "gradient_accumulation_steps=1")
    assert "warning" not in said and "tokenizing" not in said
    assert np.allclose(list(two.values()), list(expected.values()), rtol=1e-5)


def test_a_bad_line_ends_the_run_with_its_place(folder: Path) -> None:
    with open(folder / "questions.jsonl", "a") as file:
        file.write('{"prompt": "the best?"}\n')
    done = run(folder, REPOSITORY / "deepy.py", "train.py", "a.yml", "--set", "num_gpus=2")
    assert done.returncode == 2
    assert 'error: questions.jsonl:5 has a "prompt", but no "completion"\n' in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_the_model_sees_is_shown(folder: Path) -> None:
    done = run(
        folder, REPOSITORY / "tools/data.py", "show", "a.yml", "--step", "1", "-n", "4",
        "--set", "finetune_data=[questions.jsonl, chats.jsonl]", "--set", "num_gpus=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("\nmicro-batch ")[1:]
    assert len(shown) == 4
    for row in shown:
        if "the best?" in row:
            assert re.search(r"\n  questions.jsonl:[1-4], tokens 0 to \d+\n", row)
            assert 'text  "the best?"' in row and 'text  " of times<end of document>"' in row
        else:
            assert re.search(r"\n  chats.jsonl:[1-4], tokens 0 to \d+\n", row)
            assert 'text  "<user> age\\n<assistant>"' in row
            assert 'text  " wisdom\\n<end of document>"' in row
        assert "padding" in row
