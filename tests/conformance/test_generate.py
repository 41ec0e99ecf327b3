"""Upstream's greedy tokens, from upstream's checkpoints, at several grids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neox.config import NeoXConfig, from_dict
from neox.entrypoints import generate
from neox.inference.generate import continuation
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.tokenizer import build_tokenizer, load_tokenizer
from tests.conformance.small import MODEL

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 32


def values(shared: Path, checkpoint: str) -> dict[str, Any]:
    """What a YAML file would say of the model that made the reference."""
    return {
        **MODEL,
        "gpt_j_residual": checkpoint != "sequential_residual_mp2",
        "vocab_file": str(shared / "upstream/tok/small_tokenizer.json"),
        "load": str(shared / "upstream/checkpoints" / checkpoint),
        "maximum_tokens": NEW_TOKENS,
    }


def config(shared: Path, checkpoint: str, **more: Any) -> NeoXConfig:
    tp, pp = more.get("model_parallel_size", 1), more.get("pipe_parallel_size", 1)
    return from_dict(values(shared, checkpoint) | more, world_size=tp * pp)


def prompts(shared: Path) -> list[str]:
    return json.loads((shared / "upstream/ref/prompts.json").read_text())


def reference(shared: Path, checkpoint: str) -> list[list[int]]:
    """Prompt and greedy tokens as upstream found them, a list for each prompt."""
    name = checkpoint.replace("ckpt", "ref", 1)
    name = name if name.startswith("ref_") else f"ref_{name}"
    arrays = np.load(shared / f"upstream/ref/{name}.npz")
    return [arrays[f"greedy_cache_{i}"].tolist() for i in range(2)]


def greedy(settings: NeoXConfig, groups: ProcessGroups, texts: list[str]) -> list[list[int]]:
    tokenizer = build_tokenizer(settings)
    model = load_model(settings, groups)
    sequences = []
    for text in texts:
        prompt = tokenizer.tokenize(text)
        steps = continuation(model, tokenizer, settings, prompt, 0)
        sequences.append(prompt + [step.token for step in steps])
    return sequences


CHECKPOINTS = ["ckpt_mp1pp1", "ckpt_mp2pp1", "sequential_residual_mp2"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_greedy_tokens_in_one_process(shared, checkpoint, recompute):
    settings = config(shared, checkpoint, recompute=recompute)
    got = greedy(settings, ProcessGroups.single(), prompts(shared))
    assert got == reference(shared, checkpoint)


def on_a_grid(rank: int, settings: NeoXConfig, texts: list[str]) -> list[list[int]]:
    groups = initialize(Topology(pp=settings.pp, tp=settings.tp), "gloo", torch.device("cpu"))
    return greedy(settings, groups, texts)


@pytest.mark.parametrize("pp, tp", [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS[:2])
def test_greedy_tokens_on_a_grid(world, shared, checkpoint, pp, tp):
    settings = config(shared, checkpoint, pipe_parallel_size=pp, model_parallel_size=tp)
    answers = world.run(pp * tp, on_a_grid, settings, prompts(shared))
    assert answers == [reference(shared, checkpoint)] * (pp * tp)


def run_entry_point(rank: int, settings: NeoXConfig) -> None:
    groups = initialize(Topology(pp=settings.pp, tp=settings.tp), "gloo", torch.device("cpu"))
    generate.main(settings, groups)


@pytest.mark.parametrize("pp", [1, 2])
def test_results_file(world, shared, tmp_path, pp):
    texts = prompts(shared)
    source = tmp_path / "prompts.txt"
    source.write_text("\n".join(texts))
    settings = config(
        shared,
        "ckpt_mp1pp1",
        pipe_parallel_size=pp,
        text_gen_type="input-file",
        sample_input_file=str(source),
        sample_output_file=str(tmp_path / "results.jsonl"),
        return_logits=True,
    )
    world.run(pp, run_entry_point, settings)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    tokenizer = build_tokenizer(settings)
    for text, line, expected in zip(texts, lines, reference(shared, "ckpt_mp1pp1"), strict=True):
        result = json.loads(line)
        new = expected[len(tokenizer.tokenize(text)) :]
        assert result["context"] == text
        assert result["text"] == tokenizer.detokenize(new)
        assert (result["length"], result["finished"]) == (NEW_TOKENS, False)
        logits = np.array(result["logits"])
        assert logits.shape == (NEW_TOKENS, 1152)
        assert logits.argmax(-1).tolist() == new


@pytest.mark.parametrize("checkpoint, tp", [("ckpt_mp1pp1", 1), ("ckpt_mp2pp1", 2)])
def test_through_the_launcher(shared, tmp_path, checkpoint, tp):
    """The whole way: YAML and `-i`, `-o` on the command line, one process and two."""
    texts = prompts(shared)
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    settings = values(shared, checkpoint) | {
        "model_parallel_size": tp,
        "num_gpus": tp,
        "text_gen_type": "unconditional",  # -i wins over it
        "log_dir": str(tmp_path / "logs"),
    }
    (tmp_path / "small.yml").write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "deepy.py"), "generate.py", "-d", str(tmp_path), "small"]
    command += ["-i", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "results.jsonl")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    tokenizer = load_tokenizer("HFTokenizer", settings["vocab_file"])
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    for text, line, expected in zip(texts, lines, reference(shared, checkpoint), strict=True):
        result = json.loads(line)
        assert (result["context"], result["length"]) == (text, NEW_TOKENS)
        assert result["text"] == tokenizer.detokenize(expected[-NEW_TOKENS:])
