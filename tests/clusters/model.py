"""A folder with everything that train.py, generate.py and evaluate.py need, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import small_tokenizer
from tests.data.datasets import write_dataset
from tests.models import BASE

PYTHON = Path(__file__).parents[2] / ".venv" / "bin" / "python"
DEEPY = Path(__file__).parents[2] / "deepy.py"
LENGTH = 32
ITERATIONS = 4

_TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text.split(' is')[0]}} is"
doc_to_target: "{{text.split('is')[1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""


def write_folder(folder: Path, **values: Any) -> None:
    """model.yml (tp 2, pp 2, `values` over it), its data, tokenizer, prompts and a task."""
    folder.mkdir(parents=True)
    tokenizer = small_tokenizer.write(folder)
    write_dataset(folder / "data", [40] * 30, modulo=280)
    (folder / "prompts.txt").write_text("It was\nthe age of\n")
    (folder / "task.yaml").write_text(_TASK)
    texts = [json.dumps({"text": f"{i} and {i} is {2 * i}"}) for i in range(12)]
    (folder / "texts.jsonl").write_text("\n".join(texts) + "\n")
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
