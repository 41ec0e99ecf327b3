"""Checkpoints for tests that tell in one way or another what model they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.architecture import check_architecture
from neox.checkpoint.manifest import Manifest
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import layer_file, model_file
from neox.config import NeoXConfig
from neox.config.architecture import architecture
from neox.errors import CheckpointError
from neox.model.shard import file_shard, shard
from neox.parallel.groups import ProcessGroups
from tests.models import BASE, VOCAB, model_layers, random_weights
from tests.models import config_of as configuration

SINGLE = ProcessGroups.single()
EVIDENCE = ("tensors", "manifest", "args", "yaml", "beside")
STEP = "global_step5"


def write(directory: Path, *evidence: str, tp: int = 1, **values: Any) -> Checkpoint:
    """The model of BASE with `values`, in `tp` shards, and further evidence of what it is."""
    folder = directory / STEP
    folder.mkdir()
    config = configuration(**values)
    weights = random_weights(config)
    for layer in model_layers(config, SINGLE):
        if not layer.has_file:
            continue
        assert layer.layout is not None
        for rank in range(tp):
            tensors = {
                name: file_shard(
                    shard(weights[f"{layer.index}.{name}"], layout, rank, tp), layout, rank, tp
                )
                for name, layout in layer.layout.items()
            }
            torch.save(tensors, layer_file(folder, layer.index, rank))
    if "manifest" in evidence:
        Manifest(folder, 5, {"tp": tp, "pp": 1, "dp": 1}, VOCAB, architecture(config), {}).write()
    if "args" in evidence:
        keys = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
        args = {key: getattr(config, key) for key in keys} | {"tokenizer_type": "HFTokenizer"}
        torch.save({"module": None, "iteration": 5, "args": args}, model_file(folder, 0))
    if "yaml" in evidence:
        write_yaml(folder, {**BASE, **values})
    if "beside" in evidence:
        write_yaml(directory, {**BASE, **values})
    return Checkpoint.open(folder)


def write_yaml(folder: Path, values: Mapping[str, Any], name: str = "small.yml") -> Path:
    path = folder / "configs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=1))
    return path


def add_buffers(checkpoint: Checkpoint, dtype: torch.dtype, dim: int, base: float) -> None:
    """The rotary frequencies that files of the 20B era hold in every layer."""
    frequencies = (1.0 / base ** (torch.arange(0, dim, 2) / dim)).to(dtype)
    for index in (2, 3):
        path = layer_file(checkpoint.folder, index, 0)
        tensors = torch.load(path, weights_only=True)
        torch.save({**tensors, "attention.rotary_emb.inv_freq": frequencies}, path)


def refusal(checkpoint: Checkpoint, config: NeoXConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_architecture(config, checkpoint)
    return str(caught.value)
