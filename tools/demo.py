#!/usr/bin/env python3
"""The whole life of a small model in one command, `make demo`.

Tokenizes Python's language reference, trains on it at tp 2 x pp 2 in four processes, generates and
evaluates from the same checkpoint at tp 1 x pp 1, and draws the loss. Every step is a command that
can be typed by hand; it is printed before it runs. All files go to demo/, which is emptied first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OUTPUT = Path("demo")  # configs/demo.yml says so too
# The same on every machine: no GPU, though it may have some, and nothing sent to W&B's server.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline"}

TRAIN = "./deepy.py train.py configs/demo.yml"
# The checkpoint is of a 2 x 2 grid; any other reads it as it is.
ONE_PROCESS = "configs/demo.yml --set model_parallel_size=1 --set pipe_parallel_size=1"
GENERATE = f"./deepy.py generate.py {ONE_PROCESS}"
SERVE = f"./deepy.py serve.py {ONE_PROCESS}"
EVALUATE = f"./deepy.py evaluate.py {ONE_PROCESS}"


@dataclass(frozen=True)
class Step:
    """A shell command to be run in the repository's folder."""

    name: str
    title: str
    command: str

    def run(self) -> int:
        """Run the command to its end; return its status, 128 + the signal if one ended it."""
        with subprocess.Popen(self.command, shell=True, cwd=REPOSITORY) as process:
            while True:
                try:
                    status = process.wait()
                except KeyboardInterrupt:  # the command has it too, and cleans up before it ends
                    continue
                return status if status >= 0 else 128 - status


STEPS = [
    Step(
        "corpus",
        "Write Python's language reference as JSON Lines",
        ".venv/bin/python tools/demo_corpus.py --output demo/corpus.jsonl",
    ),
    Step(
        "tokenizer",
        "Train a byte-level BPE tokenizer on it",
        ".venv/bin/python tools/train_tokenizer.py --input demo/corpus.jsonl --vocab-size 512 "
        "--output demo/tokenizer.json",
    ),
    Step(
        "tokenizing",
        "Tokenize it into the .bin and .idx files that training reads",
        ".venv/bin/python tools/preprocess_data.py --input demo/corpus.jsonl "
        "--tokenizer-type HFTokenizer --vocab-file demo/tokenizer.json --append-eod "
        "--output-prefix demo/corpus",
    ),
    Step("training", "Train at tp 2 x pp 2: four processes", TRAIN),
    Step(
        "generating",
        "Generate from the checkpoint at tp 1 x pp 1: one process, no conversion",
        f"{GENERATE} -i configs/demo_prompts.txt -o demo/samples.jsonl",
    ),
    Step(
        "evaluating",
        "Evaluate on 40 documents like LAMBADA's and 40 like PIQA's",
        f"{EVALUATE} --eval_tasks lambada piqa --eval_results_prefix demo/lambada_piqa",
    ),
    Step("plotting", "Draw the loss", ".venv/bin/python tools/plot.py demo/logs -o demo/loss.png"),
]


def main() -> int:
    os.chdir(REPOSITORY)
    os.environ.update(ENVIRONMENT)
    print("$ export " + " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items()))
    shutil.rmtree(OUTPUT, ignore_errors=True)
    status, seconds = run_steps(STEPS)
    if status == 0:
        print(summary(OUTPUT, seconds))
    return status


def run_steps(steps: Sequence[Step]) -> tuple[int, dict[str, float]]:
    """Run the steps up to the first that fails: its status (or 0), and the seconds of each."""
    seconds = {}
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.title}\n$ {step.command}", flush=True)
        started = time.perf_counter()
        status = step.run()
        seconds[step.name] = time.perf_counter() - started
        if status != 0:
            print(
                f"\nerror: the demo stopped at step {number}, {step.name}: "
                f"its command ended with status {status}",
                file=sys.stderr,
            )
            return status, seconds
    return 0, seconds


def summary(folder: Path, seconds: Mapping[str, float]) -> str:
    """What was made, where it is, how long it took, and what to try next."""
    losses = [row["train/lm_loss"] for row in read_jsonl(folder / "logs" / "metrics.jsonl")]
    sample = read_jsonl(folder / "samples.jsonl")[0]
    results = next(folder.glob("*eval_results*.json"))
    times = ", ".join(f"{name} {duration:.0f} s" for name, duration in seconds.items())
    return f"""
Done in {sum(seconds.values()):.0f} s: {times}.

The loss fell from {losses[0]:.2f} to {sum(losses[-20:]) / 20:.2f} (mean of the last 20 iterations).
The model continues "{sample["context"]}" with
{quote(sample["text"])}

{folder}/corpus_text_document.bin and .idx, {folder}/tokenizer.json: the tokenized corpus
{folder}/checkpoints: the model, in NeoX's layer files
{folder}/logs: metrics.jsonl, and the W&B run kept offline in wandb/
{folder}/samples.jsonl: continuations of configs/demo_prompts.txt
{results}: the scores
{folder}/loss.png: the loss curve

Try next:
  {GENERATE} --set text_gen_type=interactive
  {SERVE}   # a page in the browser, and OpenAI's API
  {TRAIN} --set train_iters=600   # goes on from iteration 400
  {TRAIN} --dry_run               # every value, and where it comes from"""


def quote(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.exit(main())
