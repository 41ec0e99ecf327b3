"""Genuine upstream checkpoints, exported: transformers computes upstream's logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from neox.checkpoint.hf.export import export
from neox.checkpoint.hf.importing import import_folder
from neox.checkpoint.neox import Checkpoint
from neox.config import from_dict, load_config
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from neox.tokenizer import build_tokenizer
from tests.conformance.small import small_config
from tests.conformance.test_checkpoints import CHECKPOINTS

CHECKPOINT = pytest.mark.parametrize("name", CHECKPOINTS)


@pytest.fixture
def exported(name: str, shared: Path, tmp_path: Path) -> Path:
    """The checkpoint `name` as a transformers folder, in files of half a megabyte."""
    upstream = shared / "upstream"
    config = from_dict({**small_config(upstream), **CHECKPOINTS[name][1]})
    folder = tmp_path / "hf"
    export(
        Checkpoint.open(upstream / "checkpoints" / name),
        config,
        folder,
        tokenizer=build_tokenizer(config),
        max_shard_bytes=500_000,
    )
    return folder


def upstream_logits(shared: Path, name: str) -> tuple[Tensor, Tensor]:
    """Token ids and upstream's fp32 logits."""
    reference = shared / "upstream" / "ref"
    sequences = np.load(reference / "seqs.npz")
    tokens = torch.from_numpy(sequences[sequences.files[0]].astype(np.int64))
    logits = np.load(reference / f"ref_{CHECKPOINTS[name][0]}.npz")["logits"]
    return tokens, torch.from_numpy(logits)


@CHECKPOINT
def test_transformers_computes_upstreams_logits(name: str, exported: Path, shared: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens, expected = upstream_logits(shared, name)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(exported)(tokens).logits
    assert (logits - expected).abs().max().item() < 1e-5


@CHECKPOINT
def test_transformers_tokenizes_and_ends_as_upstream(
    name: str, exported: Path, shared: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompts = json.loads((shared / "upstream" / "ref" / "prompts.json").read_text())
    reference = np.load(shared / "upstream" / "ref" / f"ref_{CHECKPOINTS[name][0]}.npz")
    for number, prompt in enumerate(prompts):
        assert tokenizer(prompt)["input_ids"] == reference[f"prompt_ids_{number}"].tolist()
    assert tokenizer.eos_token == "<|endoftext|>"
    assert json.loads((exported / "generation_config.json").read_text())["eos_token_id"] == 0


@CHECKPOINT
@pytest.mark.parametrize("tp", [1, 2])
def test_back_again_at_any_tp(
    name: str, tp: int, exported: Path, shared: Path, tmp_path: Path
) -> None:
    step = import_folder(exported, tmp_path / "neox", tp=tp)
    config = load_config([step / "configs" / "hf.yml"], purpose="generate")
    tokens, expected = upstream_logits(shared, name)
    logits = load_model(config, ProcessGroups.single())(tokens)
    assert logits is not None
    assert (logits - expected).abs().max().item() < 1e-5
