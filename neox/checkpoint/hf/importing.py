"""Another program's folder as a checkpoint of layer files, with a configuration to use it by."""

from __future__ import annotations

from pathlib import Path

import torch

from neox.atomic import write_bytes
from neox.checkpoint.architecture import describe
from neox.checkpoint.directory import UNFINISHED
from neox.checkpoint.hf.files import TransformersFiles, check_new
from neox.checkpoint.lock import LOCK
from neox.checkpoint.mesh import MeshFiles
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import with_adapter
from neox.checkpoint.reshard import choose_rows, reshard
from neox.config import ModelConfig, from_dict, hf, mesh
from neox.errors import CheckpointError

CONFIG = "hf.yml"


def import_folder(
    folder: Path,
    output: Path,
    *,
    tp: int = 1,
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    adapter: Path | None = None,
) -> Path:
    """Write the weights to `output`, a new folder, as iteration 0 in `tp` shards; return the step.

    The folder is one of transformers, or of mesh-transformer-jax, of which `config` tells what
    MeshFiles cannot know. They keep their precision, unless `dtype` gives another, and the
    vocabulary its rows. The LoRA adapters at `adapter` are merged into them.
    configs/hf.yml in the step describes the model and names `output` and the tokenizer, if there is
    one, which is copied there: generate.py needs no more. Memory holds one shard of one layer. Not
    collective, one process. Raises CheckpointError, and ConfigError where `tp` does not divide the
    model.
    """
    if not hf.is_transformers(folder) and not mesh.is_mesh(folder):
        raise CheckpointError(f"{folder} holds no model of transformers: config.json and weights.")
    check_new(output, remains=(UNFINISHED, LOCK))  # of one that was killed; reshard clears it away
    checkpoint = Checkpoint.open(folder, config=config)
    assert isinstance(checkpoint.source, TransformersFiles | MeshFiles)
    describe(checkpoint)  # all of it, or an error
    model = checkpoint.source.config
    values = {**model.values, "seq_length": model.values["max_position_embeddings"]}
    target = from_dict({**values, "model_parallel_size": tp}, world_size=tp)
    rows = choose_rows(checkpoint, target, None, None)
    if adapter is not None:
        checkpoint = with_adapter(checkpoint, target, adapter)
    place = output.absolute()
    precision = model.precision or "fp32" if dtype is None else hf.PRECISIONS[_name(dtype)]
    values |= {"precision": precision, "pipe_parallel_size": 1, "load": str(place)}
    files: dict[str, Path] = {}
    if model.tokenizer is not None:
        kind, files = model.tokenizer
        values |= {"tokenizer_type": kind}
        values |= {key: str(place / path.name) for key, path in files.items()}
    configs = {CONFIG: hf.yaml_text(values)}
    step = reshard(
        checkpoint, output, target, rows, todays_names=True, dtype=dtype, configs=configs
    )
    for path in files.values():
        try:
            write_bytes(place / path.name, path.read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"{output}: its {path.name} cannot be written: {error.strerror}."
            ) from error
    return step


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
