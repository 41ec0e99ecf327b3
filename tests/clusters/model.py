"""A folder with everything that train.py, generate.py and evaluate.py need, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import small_tokenizer
from tests.data.datasets import write_dataset
from tests.evaluation.sums import write_sums
from tests.models import BASE

PYTHON = Path(__file__).parents[2] / ".venv" / "bin" / "python"
DEEPY = Path(__file__).parents[2] / "deepy.py"
LENGTH = 32
ITERATIONS = 4


def write_folder(folder: Path, **values: Any) -> None:
    """model.yml (tp 2, pp 2, `values` over it), its data, tokenizer, prompts, a task and hosts."""
    folder.mkdir(parents=True)
    tokenizer = small_tokenizer.write(folder)
    write_dataset(folder / "data", [40] * 30, modulo=280)
    (folder / "hosts").write_text("alpha slots=2\nbeta slots=2\n")
    (folder / "prompts.txt").write_text("It was\nthe age of\n")
    write_sums(folder, [f"{i} and {i} is {2 * i}" for i in range(12)])
    settings = BASE | {
        "num_layers": 4,
        "seq_length": LENGTH,
        "max_position_embeddings": LENGTH,
        "train_iters": ITERATIONS,
        "lr_decay_iters": ITERATIONS,
        "log_interval": 1,
        "model_parallel_size": 2,
        "pipe_parallel_size": 2,
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(tokenizer),
        "make_vocab_size_divisible_by": 64,
        "data_path": str(folder / "data"),
        "checkpoint_factor": ITERATIONS,
        "maximum_tokens": 6,
        "eval_iters": 0,
        "split": "1,0,0",
    }
    (folder / "model.yml").write_text(json.dumps(settings | values))


def losses(log_dir: Path) -> list[float]:
    """The training losses that a run wrote, by iteration."""
    lines = (log_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["train/lm_loss"] for record in records if "train/lm_loss" in record]
