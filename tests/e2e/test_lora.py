"""Fine-tuning by adapters from the command line: train, go on, generate, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import scripts, small_tokenizer
from tests.models import BASE
from tests.world import World

REPOSITORY = Path(__file__).parents[2]
MODEL = {
    **{key: BASE[key] for key in ("num_layers", "num_attention_heads", "pos_emb", "rotary_pct")},
    "hidden_size": 64,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "seq_length": 32,
    "max_position_embeddings": 32,
}
RUN = MODEL | {
    "load": "base",
    "load_in_8bit": True,
    "lora": {"rank": 8, "alpha": 16, "targets": ["all-linear", "final_linear"]},
    "tokenizer_type": "HFTokenizer",
    "vocab_file": "tokenizer.json",
    "finetune_data": "questions.jsonl",
    "train_iters": 60,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.02}},
    "checkpoint_activations": True,
    "save": "adapters",
    "checkpoint_factor": 30,
    "temperature": 0.0,
    "maximum_tokens": 12,
    "prompt_end": "@@",
    "num_gpus": 1,
}
QUESTIONS = {"it was?": " the best of times", "the age?": " of foolishness"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    small_tokenizer.write(folder)
    (folder / "a.yml").write_text(yaml.safe_dump(RUN))
    words = ["synthesize", "--config", "a.yml", "--output", "base", "--vocab_size", "280"]
    made = scripts.run(world, REPOSITORY / "tools/checkpoint.py", *words, cwd=folder)
    assert made.returncode == 0, made.stderr
    records = [{"prompt": p, "completion": c} for p, c in QUESTIONS.items()]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    (folder / "prompts.txt").write_text("@@".join(QUESTIONS))
    return folder


def deepy(world: World, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return scripts.run(world, REPOSITORY / "deepy.py", *words, cwd=folder)


def completions(world: World, folder: Path, *overrides: str) -> list[str]:
    words = ["generate.py", "a.yml", "-i", "prompts.txt", "-o", "out.jsonl"]
    done = deepy(world, folder, *words, *(w for o in overrides for w in ("--set", o)))
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["text"] for line in (folder / "out.jsonl").read_text().splitlines()]


def test_a_model_learns_texts_and_the_base_stays(world: World, folder: Path) -> None:
    before = {path: path.read_bytes() for path in (folder / "base").rglob("*") if path.is_file()}
    half = deepy(world, folder, "train.py", "a.yml", "--set", "exit_interval=30")
    assert half.returncode == 0, half.stderr
    done = deepy(world, folder, "train.py", "a.yml")
    assert done.returncode == 0, done.stderr
    assert "resuming adapters/global_step30 at iteration 30" in done.stdout + done.stderr

    names = {path.name for path in (folder / "adapters/global_step60").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "manifest.json"} <= names
    assert not any(name.startswith("layer_") for name in names)
    after = {path: path.read_bytes() for path in (folder / "base").rglob("*") if path.is_file()}
    assert after == before

    learnt = list(QUESTIONS.values())
    assert completions(world, folder) != learnt
    assert completions(world, folder, "adapter=adapters") == learnt
    assert completions(world, folder, "adapter=adapters", "load_in_8bit=false") == learnt


REFUSED = {
    "adapters are no model": (
        ("generate.py", "a.yml", "-i", "prompts.txt", "--set", "load=adapters"),
        "holds adapters (adapter_model.safetensors) and not the model that they are for",
    ),
    "another rank": (
        ("train.py", "a.yml", "--set", "lora.rank=4", "--set", "train_iters=70"),
        "rank 8 and alpha 16, but lora has 4 and 16",
    ),
    "other targets": (
        ("train.py", "a.yml", "--set", "lora.targets=[dense]", "--set", "train_iters=70"),
        "Give lora.targets the matrices that the adapters are of",
    ),
    "no such folder": (
        ("generate.py", "a.yml", "-i", "prompts.txt", "--set", "adapter=adaptors"),
        'adapter is "adaptors", but there is no such folder. Did you mean "adapters"?',
    ),
    "no such target": (
        ("train.py", "a.yml", "--set", "lora.targets=[query_key_valu]"),
        "Did you mean query_key_value?",
    ),
    "one of three": (
        ("train.py", "a.yml", "--set", "lora.targets=[q_proj]"),
        "queries, keys and values are made by one matrix here. Use query_key_value.",
    ),
    "frozen": (("train.py", "a.yml", "--set", "lora=null"), "8-bit weights cannot be trained"),
    "no base": (("train.py", "a.yml", "--set", "load=null"), "but load is missing"),
    "sharded weights": (
        ("train.py", "a.yml", "--set", "zero_optimization.stage=3"),
        "Use stage 0, 1 or 2",
    ),
    "whole models": (
        ("train.py", "a.yml", "--set", "save=base"),
        "holds the checkpoints of a run that trained whole models",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(world: World, folder: Path, case: str) -> None:
    words, message = REFUSED[case]
    if not (folder / "adapters/global_step60").is_dir():
        assert deepy(world, folder, "train.py", "a.yml").returncode == 0
    done = deepy(world, folder, *words)
    assert done.returncode == 2, done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
