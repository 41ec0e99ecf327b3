"""What a checkpoint is, as far as its files tell: for `inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox import log
from neox.checkpoint.architecture import recorded
from neox.checkpoint.hf.files import TransformersFiles
from neox.checkpoint.mesh import MeshFiles
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.optimizer_files import has_plain_state, optimizer_files
from neox.checkpoint.sources import LayerFiles, ModelFiles, Shard
from neox.checkpoint.tensor_facts import Facts
from neox.config import ModelConfig
from neox.config.architecture import open_keys
from neox.config.values import show
from neox.errors import CheckpointError
from neox.model.layout import (
    Split,
    embedding_layout,
    final_norm_layout,
    head_layout,
    transformer_layout,
)
from neox.parallel.groups import ProcessGroups

_CHUNK = 1 << 24  # elements at a time: 128 MiB of double precision
_KINDS = {
    LayerFiles: "a NeoX checkpoint of layer files",
    ModelFiles: "a NeoX checkpoint of whole-model files (pipe_parallel_size 0)",
    MeshFiles: "a checkpoint of mesh-transformer-jax",
}


@dataclass(frozen=True)
class Statistics:
    """Of a whole tensor, in double precision."""

    min: float
    max: float
    mean: float
    std: float


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor by its name in the files. `split` is None for what no layout knows."""

    layer: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    split: str | None
    statistics: Statistics | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Summary:
    folder: Path
    kind: str
    iteration: int
    shards: int
    layers: int
    padded_vocab_size: int
    parameters: int
    dtypes: Mapping[str, int]  # elements of each
    bytes: int  # of all files in the folder, optimizer state included
    names: str
    optimizer: str | None
    has_manifest: bool
    architecture: Facts


def summarize(checkpoint: Checkpoint) -> Summary:
    """Read names, shapes and what is said about the architecture. Not collective.

    Raises CheckpointError for files that cannot be read.
    """
    tensors = list(tensors_of(checkpoint))
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.split is not None:
            dtypes[tensor.dtype] += tensor.numel
    return Summary(
        folder=checkpoint.folder,
        kind=_kind(checkpoint),
        iteration=checkpoint.iteration,
        shards=checkpoint.tp,
        layers=checkpoint.depth,
        padded_vocab_size=checkpoint.padded_vocab_size,
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        bytes=sum(path.stat().st_size for path in checkpoint.folder.rglob("*") if path.is_file()),
        names=_era(checkpoint),
        optimizer=_optimizer(checkpoint),
        has_manifest=checkpoint.manifest is not None,
        architecture=recorded(checkpoint),
    )


def describe(summary: Summary) -> str:
    """For a reader: one thing a line, and the architecture with the place of each fact."""
    dtypes = ", ".join(
        f"{dtype} ({count:,})" if len(summary.dtypes) > 1 else dtype
        for dtype, count in summary.dtypes.items()
    )
    rows = [
        ("folder", f"{summary.folder}, {summary.kind}"),
        ("iteration", f"{summary.iteration}"),
        ("shards", f"{summary.shards}"),
        ("layers", f"{summary.layers}"),
        ("padded vocabulary", f"{summary.padded_vocab_size}"),
        ("parameters", f"{summary.parameters:,}"),
        ("precision", dtypes),
        ("bytes", f"{summary.bytes:,}"),
        ("names", summary.names),
        ("optimizer state", summary.optimizer or "none"),
        ("manifest", "yes" if summary.has_manifest else "none"),
    ]
    facts = [
        (name, show(fact.value), fact.where) for name, fact in sorted(summary.architecture.items())
    ]
    lines = [*_columns(rows), "architecture", *(f"  {row}" for row in _columns(facts))]
    left_open = open_keys({name: fact.value for name, fact in summary.architecture.items()})
    if left_open:
        lines.append(f"  not told: {', '.join(left_open)}")
    return "\n".join(lines)


def table(tensors: Sequence[StoredTensor]) -> str:
    """A line for each tensor."""
    rows = [["layer", "name", "shape", "dtype", "split"]]
    rows[0] += ["min", "max", "mean", "std"] if tensors[0].statistics else []
    for tensor in tensors:
        shape = "x".join(map(str, tensor.shape))
        row = [f"{tensor.layer:02d}", tensor.name, shape, tensor.dtype, tensor.split or "buffer"]
        numbers = astuple(tensor.statistics) if tensor.statistics else ()
        rows.append(row + [f"{number:.4g}" for number in numbers])
    return "\n".join(_columns(rows))


def to_json(summary: Summary, tensors: Sequence[StoredTensor] | None) -> dict[str, Any]:
    """Both as json.dumps takes them; numbers that are no numbers become None."""
    facts = {
        name: {"value": fact.value, "where": fact.where}
        for name, fact in summary.architecture.items()
    }
    found = {**vars(summary), "folder": str(summary.folder), "architecture": facts}
    if tensors is not None:
        found["tensors"] = [_tensor_to_json(tensor) for tensor in tensors]
    return found


def _tensor_to_json(tensor: StoredTensor) -> dict[str, Any]:
    found = asdict(tensor)
    numbers = found.pop("statistics") or {}
    return found | {name: x if math.isfinite(x) else None for name, x in numbers.items()}


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def tensors_of(checkpoint: Checkpoint, *, values: bool = False) -> Iterator[StoredTensor]:
    """Every tensor, whole, in the order of the layers. With `values` its numbers are read, too.

    Not collective. Raises CheckpointError.
    """
    facts = recorded(checkpoint)
    splits = _splits(facts["gpt_j_residual"].value if "gpt_j_residual" in facts else None)
    with log.progress(total=len(checkpoint.indices), desc="reading", unit="layer") as bar:
        for index in checkpoint.indices:
            if values:
                checkpoint.verify_layer(index, ProcessGroups.single())
            shards = checkpoint.shards(index)
            for today, name in shards[0].names.items():
                found = _of(shards, today, values)
                yield _stored_tensor(index, name, splits.get(today), found, values)
            for name in shards[0].buffers:
                yield _stored_tensor(index, name, None, [shards[0].buffers[name]], values)
            bar.update()


def _of(shards: Sequence[Shard], name: str, values: bool) -> list[Tensor]:
    if missing := [str(shard.where) for shard in shards if name not in shard.tensors]:
        raise CheckpointError(f"{missing[0]} holds no {name}, but {shards[0].where} does.")
    return [shard.tensors[name] if values else shard.described(name) for shard in shards]


def _stored_tensor(
    index: int, name: str, split: str | None, shards: Sequence[Tensor], values: bool
) -> StoredTensor:
    shape, parts = list(shards[0].shape), list(shards[:1])
    if split in _DIMS:
        parts = list(shards)
        shape[_DIMS[split]] = sum(part.shape[_DIMS[split]] for part in parts)
    elif split == Split.PARTIAL_SUM.value and values:
        parts = [torch.stack([shard.double() for shard in shards]).sum(0)]
    dtype = str(shards[0].dtype).removeprefix("torch.")
    statistics = _statistics(parts) if values else None
    return StoredTensor(index, name, tuple(shape), dtype, split, statistics)


def _statistics(parts: Sequence[Tensor]) -> Statistics:
    chunks = [chunk for part in parts for chunk in part.reshape(-1).split(_CHUNK)]
    rows = torch.tensor([_sums(chunk.double()) for chunk in chunks], dtype=torch.float64)
    count = sum(part.numel() for part in parts)
    mean, square = (rows[:, column].sum().item() / count for column in (2, 3))
    low, high = rows[:, 0].min().item(), rows[:, 1].max().item()
    return Statistics(low, high, mean, max(0.0, square - mean * mean) ** 0.5)


def _sums(chunk: Tensor) -> list[float]:
    return [t.item() for t in (*chunk.aminmax(), chunk.sum(), chunk.square().sum())]


# Along which dimension a split tensor's shards are joined.
_DIMS = {Split.COLUMN.value: 0, Split.ROW.value: 1}


@cache
def _splits(gpt_j_residual: bool | None) -> dict[str, str]:
    """How every tensor that a layout knows is split, by name: none but the row-parallel biases
    depend on the architecture."""
    if gpt_j_residual is None:
        one, other = _splits(True), _splits(False)
        return {
            name: split if split == other[name] else f"{other[name]} or {split}"
            for name, split in one.items()
        }
    found: dict[str, str] = {}
    for norm in ("layernorm", "rmsnorm"):
        config = ModelConfig(
            num_layers=1,
            hidden_size=1,
            num_attention_heads=1,
            seq_length=1,
            max_position_embeddings=1,
            norm=norm,
            gpt_j_residual=gpt_j_residual,
            use_bias_in_final_linear=True,
        )
        for layout in (
            embedding_layout(config, 1),
            transformer_layout(config),
            final_norm_layout(config),
            head_layout(config, 1),
        ):
            found |= {name: parameter.split.value for name, parameter in layout.items()}
    return found


def _kind(checkpoint: Checkpoint) -> str:
    source = checkpoint.source
    if isinstance(source, TransformersFiles):
        return "a transformers folder" + (", of 8-bit weights" if source.is_eight_bit else "")
    return _KINDS[type(source)]


def _era(checkpoint: Checkpoint) -> str:
    if isinstance(checkpoint.source, TransformersFiles):
        return "those of transformers"
    if isinstance(checkpoint.source, MeshFiles):
        return "none: an array's place tells what it is"
    shards = [shard for index in checkpoint.indices for shard in checkpoint.shards(index)[:1]]
    if any(today != name for shard in shards for today, name in shard.names.items()):
        return "of the 20B and Pythia era (dense_h_to_4h)"
    return "of today's upstream (linear1)"


def _optimizer(checkpoint: Checkpoint) -> str | None:
    """What there is of optimizer state, and the grid that it is of."""
    if isinstance(checkpoint.source, TransformersFiles):
        return None
    if isinstance(checkpoint.source, MeshFiles):
        return "of JAX, which stays behind" if checkpoint.source.has_optimizer else None
    try:
        files = optimizer_files(checkpoint.folder, checkpoint.tp)
        if files is not None:
            return f"ZeRO's, of {files}"
        is_plain = has_plain_state(checkpoint.folder)
    except CheckpointError as error:
        return f"unreadable: {error}"
    return "in the mp_rank files, without ZeRO" if is_plain else None
