"""Checkpoints in NeoX's layers, whatever the files are: opened, verified, read.

Any number of shards is read into any tp: each rank maps the files into memory and copies its own
slices (neox.model.shard) straight into its parameters, so nothing is held besides the model.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from neox.checkpoint.few_bits import hold
from neox.checkpoint.files import check_crc, save_file
from neox.checkpoint.folders import read_manifest, resolve
from neox.checkpoint.hf.files import TransformersFiles
from neox.checkpoint.manifest import Entry, Manifest
from neox.checkpoint.mesh import MeshFiles
from neox.checkpoint.sources import (
    ADAPTERS,
    AdapterFiles,
    LayerFiles,
    ModelFiles,
    Shard,
    Source,
    has_layer_files,
    has_model_files,
    layer_file,
)
from neox.config import ModelConfig
from neox.config.hf import is_transformers
from neox.config.mesh import is_mesh
from neox.errors import CheckpointError
from neox.model.gpt import Layer, LocalLayers
from neox.model.layout import ParamLayout
from neox.model.shard import file_shard, reshard, reshard_into
from neox.parallel.groups import ProcessGroups

_AHEAD = 4  # files verified before it is their turn: two layers of two shards


class _Ahead:
    """Files that a thread verifies in turn, at most a few ahead of those that are waited for."""

    def __init__(self, verify: Callable[[Path], Future[None]], files: Iterable[Path]) -> None:
        self._verify = verify
        self._files = deque(files)
        self._started: dict[Path, Future[None]] = {}

    def wait(self, paths: list[Path]) -> None:
        """Until `paths` are verified, those that are among the files. Raises CheckpointError."""
        while self._files and len(self._started) < len(paths) + _AHEAD:
            path = self._files.popleft()
            self._started[path] = self._verify(path)
        for path in paths:
            if path in self._started:
                self._started.pop(path).result()


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: which shards exist; tensors are read on demand.

    Nothing here is collective. Files are checked against the manifest, or where there is none by
    the checksums of their zip archives, before `load_into` uses them; those in `verified` were.
    """

    folder: Path
    source: Source = field(repr=False)
    manifest: Manifest | None = field(repr=False, default=None)
    verified: set[Path] = field(repr=False, default_factory=set)
    _ahead: list[_Ahead] = field(repr=False, default_factory=list)  # at most one

    @classmethod
    def open(
        cls, directory: Path, iteration: int | None = None, config: ModelConfig | None = None
    ) -> Checkpoint:
        """Find the files of a step and check that there are as many shards of every layer.

        The directory may also be a transformers folder, or one of mesh-transformer-jax, whose
        heads `config` tells. Raises CheckpointError, also for files that the manifest lists and
        are missing or of another size.
        """
        folder = resolve(directory, iteration)
        if folder == directory and is_transformers(folder):
            return cls(folder, TransformersFiles(folder))
        if folder == directory and is_mesh(folder):
            return cls(folder, MeshFiles(folder, config))
        manifest = read_manifest(folder)
        if manifest is not None:
            manifest.check_sizes("layer_*")
        if manifest is not None and ADAPTERS in manifest.files:
            return cls(folder, AdapterFiles(folder, manifest.grid["tp"]), manifest)
        if has_layer_files(folder):
            return cls(folder, LayerFiles(folder), manifest)
        if has_model_files(folder):
            return cls(folder, ModelFiles(folder), manifest)
        raise CheckpointError(
            f"{folder} holds no layer files (layer_XX-model_YY-model_states.pt) and no weights in "
            "mp_rank_XX_model_states.pt."
        )

    @property
    def tp(self) -> int:
        """The number of shards of each layer."""
        return self.source.tp

    @property
    def iteration(self) -> int:
        """The training step, by the manifest or the folder's name; 0 where neither tells it.

        The folder may have been renamed, or be given as a symbolic link or ".".
        """
        if self.manifest is not None:
            return self.manifest.iteration
        for name in (self.folder.name, self.folder.resolve().name):
            if match := re.match(r"global_step(\d+)$", name):
                return int(match[1])
        return 0

    @property
    def indices(self) -> list[int]:
        """The NeoX indices of the layers that have tensors, in order."""
        return sorted(self.source.indices)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all shards."""
        name = "word_embeddings.weight"
        rows = 0
        for shard in self.shards(0):
            if name not in shard.tensors:
                raise CheckpointError(
                    f"{shard.where} holds no {name}: it is not an embedding layer."
                )
            rows += shard.described(name).shape[0]
        return rows

    def shards(self, index: int) -> list[Shard]:
        """Each tp shard of a layer, by today's names, memory-mapped. Raises CheckpointError."""
        if index not in self.source.indices and not isinstance(self.source, AdapterFiles):
            raise CheckpointError(
                f"{self.folder} holds no {layer_file(self.folder, index, 0).name}: find the "
                "missing file."
            )
        return self.source.shards(index)

    def read(self, layer: Layer, groups: ProcessGroups) -> dict[str, Tensor]:
        """This rank's tensors of one layer, by today's names, in the precision of the files."""
        return {
            name: reshard(shards, layout, groups.tp_rank, groups.tp)
            for name, layout, shards in self.tensors(layer)
        }

    def load_into(self, module: nn.Module, layer: Layer, groups: ProcessGroups) -> None:
        """Fill a built layer's parameters, converting to their precision, one at a time.

        The files of the layer are verified before, divided over the ranks that read them. Raises
        CheckpointError.
        """
        self.verify_layer(layer.file_index, groups)
        self._fill(module, layer, groups)
        self._forget(layer.file_index, groups)  # its files are mapped no more

    def _fill(self, module: nn.Module, layer: Layer, groups: ProcessGroups) -> None:
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            stored = self._fitting(layer)
            for name, layout in (layer.layout or {}).items():
                if name not in parameters:
                    hold(module.get_submodule(name), name, layout, stored, groups)
                    continue
                target, shards = parameters[name], [shard.tensors[name] for shard in stored]
                reshard_into(target, shards, layout, groups.tp_rank, groups.tp)
                if target.dtype is torch.float16 and shards[0].dtype is not torch.float16:
                    self._check_range(name, layer.file_index, target, shards)

    def _check_range(self, name: str, index: int, target: Tensor, shards: list[Tensor]) -> None:
        """Raises CheckpointError when a finite number has become infinite."""
        if not target.isfinite().all() and all(shard.isfinite().all() for shard in shards):
            raise CheckpointError(
                f"{self.folder}: {name} of layer {index:02d} has numbers that float16 cannot hold, "
                "which ends at 65504. Use --set precision=bfloat16 or fp32."
            )

    def verify_file(self, path: Path) -> None:
        """Read a file through and compare it with its checksum. Raises CheckpointError."""
        if self.manifest is not None:
            self.manifest.check(path)
        elif path.suffix != ".safetensors":  # they hold no checksum
            check_crc(path)
        self.verified.add(path)

    @contextmanager
    def verifying_ahead(self, layers: Iterable[Layer], groups: ProcessGroups) -> Iterator[None]:
        """Have a thread verify the files of `layers`, which `load_into` is then called for in turn.

        The disk is read while memory is copied.
        """
        indices = [layer.file_index for layer in layers if layer.has_parameters]
        files = dict.fromkeys(path for index in indices for path in self._share(index, groups))
        with ThreadPoolExecutor(1) as thread:
            self._ahead.append(_Ahead(lambda path: thread.submit(self.verify_file, path), files))
            try:
                yield
            finally:
                self._ahead.clear()
                thread.shutdown(cancel_futures=True)

    def verify_layer(self, index: int, groups: ProcessGroups) -> None:
        """`verify_file` of this rank's share of a layer's files. Raises CheckpointError."""
        paths = self._share(index, groups)
        if self._ahead:
            self._ahead[0].wait(paths)
        for path in paths:
            if path not in self.verified:
                self.verify_file(path)

    def _forget(self, index: int, groups: ProcessGroups) -> None:
        """Let the system drop a layer's files from its page cache, where they would crowd memory.

        A checkpoint of more than a quarter of the memory, cached beside the model that is made from
        it, costs more in fresh pages than it saves: with its own pages used again, the layers of
        benchmarks/load.py load in a third of the time. A smaller one stays, for the next start.
        """
        if groups.world_size > 1 or not isinstance(self.source, LayerFiles):
            return  # others may be about to read them, and so may other layers
        if self._size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4:
            for path in self.source.files(index):
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    @cached_property
    def _size(self) -> int:
        """Bytes of all layers' files."""
        files = {path for index in self.source.indices for path in self.source.files(index)}
        return sum(path.stat().st_size for path in files)

    def _share(self, index: int, groups: ProcessGroups) -> list[Path]:
        """The files of a layer that this rank is to verify, of the ranks that read them."""
        if index not in self.source.indices:
            return []
        here, of = groups.dp_rank * groups.tp + groups.tp_rank, groups.dp * groups.tp
        files = self.source.files(index)
        return [path for path in files[here::of] if path not in self.verified]

    @property
    def depth(self) -> int:
        """Transformer layers by the files: they are numbered from 2, and a gap follows the last."""
        depth = 0
        while depth + 2 in self.source.indices:
            depth += 1
        return depth

    def tensors(self, layer: Layer) -> Iterator[tuple[str, ParamLayout, list[Tensor]]]:
        """Each parameter of a layer with its layout and its stored shards, checked."""
        stored = self._fitting(layer)
        for name, layout in (layer.layout or {}).items():
            yield name, layout, [shard.tensors[name] for shard in stored]

    def dtypes(self, layer: Layer) -> dict[str, torch.dtype]:
        """The precision of each parameter of a layer, whose numbers are not read."""
        stored = self._fitting(layer)
        return {name: stored[0].described(name).dtype for name in layer.layout or {}}

    def _fitting(self, layer: Layer) -> list[Shard]:
        """The shards of a layer. Raises CheckpointError where names or shapes are others."""
        assert layer.layout is not None
        if layer.index != layer.file_index and layer.index in self.source.indices:
            raise CheckpointError(
                f"{self.folder} holds {layer_file(self.folder, layer.index, 0).name}, an output "
                "projection of its own, but the configuration ties it to the embedding "
                "(no_weight_tying)."
            )
        stored = self.shards(layer.file_index)
        for shard in stored:
            self._check_names(shard, layer)
        for name, layout in layer.layout.items():
            shards = [shard.described(name) for shard in stored]
            self._check_shapes(layer.file_index, name, shards, layout)
        return stored

    def _check_names(self, shard: Shard, layer: Layer) -> None:
        assert layer.layout is not None
        present = shard.tensors.keys()
        # With gpt_j_tied upstream still writes the second norm, which nothing reads.
        ignored = {name for name in present if name.startswith("post_attention_layernorm.")}
        missing = set(layer.layout) - present
        surplus = present - set(layer.layout) - ignored
        if missing or surplus:
            raise CheckpointError(
                f"{shard.where} does not fit the configuration's architecture: "
                + "; ".join(
                    f"{what} {', '.join(sorted(names))}"
                    for what, names in (("it lacks", missing), ("it also has", surplus))
                    if names
                )
                + ". It is of another model, or damaged."
            )

    def _check_shapes(
        self, index: int, name: str, shards: list[Tensor], layout: ParamLayout
    ) -> None:
        shapes = [list(tensor.shape) for tensor in shards]
        if any(shape != shapes[0] for shape in shapes):
            raise CheckpointError(
                f"{self.folder}: the shards of {name} of layer {index:02d} have different "
                f"shapes, {shapes}: they are not of one checkpoint."
            )
        whole = list(shapes[0])
        if layout.dim is not None:
            whole[layout.dim] = sum(tensor.shape[layout.dim] for tensor in shards)
        wanted = list(layout.shape)
        if layout.is_vocab:
            whole[0] = wanted[0]  # vocabulary rows are padded or trimmed
        if whole != wanted:
            raise CheckpointError(
                f"{self.folder}: {name} of layer {index:02d} is {whole} "
                f"(over {len(shards)} shards), but the configuration makes it {wanted}: it is of "
                "another model."
            )


def save_layers(folder: Path, local: LocalLayers, groups: ProcessGroups) -> dict[str, Entry]:
    """`save_layer` of each of this rank's layers that has a file; what was written, by name."""
    return {
        layer_file(folder, layer.index, groups.tp_rank).name: save_layer(
            folder, layer, module, groups
        )
        for layer, module in local
        if layer.has_file
    }


def save_layer(folder: Path, layer: Layer, module: nn.Module, groups: ProcessGroups) -> Entry:
    """Write this rank's shard of one layer into `folder`, which is not yet in its final place."""
    assert layer.layout is not None
    tensors = {
        # A clone: a parameter may be a view of a large flat buffer, which torch would save whole.
        name: file_shard(parameter.detach(), layer.layout[name], groups.tp_rank, groups.tp)
        .cpu()
        .clone()
        for name, parameter in module.named_parameters()
    }
    return save_file(tensors, layer_file(folder, layer.index, groups.tp_rank))
