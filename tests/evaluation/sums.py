"""A task of lm-eval's over texts such as `2 and 2 is 4`: what follows `is` is to be told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

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


def write_sums(folder: Path, texts: Sequence[str]) -> None:
    """The task `sums` and its texts, for `include_path: folder`."""
    (folder / "task.yaml").write_text(_TASK)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
