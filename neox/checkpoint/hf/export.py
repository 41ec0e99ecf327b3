"""A checkpoint as a transformers folder, which proves that it computes the same."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neox import log
from neox.atomic import write_bytes, write_text
from neox.checkpoint.hf.files import SAFETENSORS, check_new
from neox.checkpoint.hf.proof import prove
from neox.checkpoint.hf.tensors import Recipe, recipes
from neox.checkpoint.hf.tokenizer import Tokenizer, special_tokens, tokenizer_files
from neox.checkpoint.hf.writing import Spec, is_writable, size, write_safetensors
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.reshard import cast, check_layers
from neox.checkpoint.vocabulary import check_tokens
from neox.config import NeoXConfig, hf
from neox.config.hf_classes import config_json, model_type
from neox.errors import CheckpointError
from neox.model.gpt import Layer, layers
from neox.model.layout import ParamLayout
from neox.model.shard import reshard
from neox.parallel.groups import ProcessGroups

_MIB = 1 << 20


@dataclass(frozen=True)
class _Part:
    """One tensor to be written."""

    layer: Layer
    recipe: Recipe
    dtype: torch.dtype

    @property
    def spec(self) -> Spec:
        return self.recipe.name, self.dtype, self.recipe.shape


def export(
    checkpoint: Checkpoint,
    config: NeoXConfig,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `checkpoint`, whose architecture `config` tells, to the new folder `output`.

    Weights keep their precision unless `dtype` gives another. `tokenizer` is the one that `config`
    names; without it the folder has none, and no special tokens. The folder appears when it is
    whole and transformers has computed the same logits from it (neox.checkpoint.hf.proof). Memory
    holds one tensor, or one layer where tensors are made (neox.checkpoint.lazy), and in the proof
    one layer in fp32. Not collective, one process.
    Raises ConfigError where transformers has no class for the model, and CheckpointError.
    """
    check_new(output)
    kind = model_type(config)
    if tokenizer is not None:
        check_tokens(tokenizer.vocab_size, checkpoint.padded_vocab_size)
    parts = list(_parts(checkpoint, config, kind, dtype))
    place = output.absolute()
    aside = place.parent / f".{place.name}.unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write_weights(aside, checkpoint, parts, max_shard_bytes)
        _write_texts(aside, checkpoint, config, _main_dtype(parts), tokenizer)
        prove(checkpoint, config, aside, dtype)
        aside.rename(place)
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _parts(
    checkpoint: Checkpoint, config: NeoXConfig, kind: str, dtype: torch.dtype | None
) -> Iterator[_Part]:
    """Every tensor to be written, the embedding first; nothing of the checkpoint is read yet."""
    model = layers(config, checkpoint.padded_vocab_size, torch.float32, ProcessGroups.single())
    with_files = [layer for layer in model if layer.has_file]
    check_layers(checkpoint, with_files)
    if kind in ("gpt_neox", "gptj", "gpt2") and config.kv_heads < config.num_attention_heads:
        log.info(
            f"{kind} has a key and a value for every query head: each of the {config.kv_heads} "
            f"is repeated {config.num_attention_heads // config.kv_heads} times"
        )
    for layer in with_files:
        stored = checkpoint.dtypes(layer)
        if foreign := {str(found) for found in stored.values() if not is_writable(found)}:
            raise CheckpointError(f"{checkpoint.folder} holds {', '.join(foreign)} numbers.")
        for recipe in recipes(config, kind, layer):
            # Zeros are biases that we have not: of the type of the layer's other tensors.
            found = stored[recipe.source] if recipe.source else next(iter(stored.values()))
            yield _Part(layer, recipe, dtype or found)


def _main_dtype(parts: Sequence[_Part]) -> torch.dtype:
    """The one that most of the bytes are in: from_pretrained gives it to all."""
    held: Counter[torch.dtype] = Counter()
    for part in parts:
        held[part.dtype] += size(part.spec)
    return held.most_common(1)[0][0]


def _write_weights(
    folder: Path, checkpoint: Checkpoint, parts: Sequence[_Part], max_bytes: int
) -> None:
    """model.safetensors, or several of them and their index where one would be too large."""
    files = _divide(parts, max_bytes)
    names = [SAFETENSORS]
    if len(files) > 1:
        stem, dot, suffix = SAFETENSORS.partition(".")
        names = [
            f"{stem}-{number:05d}-of-{len(files):05d}{dot}{suffix}"
            for number in range(1, len(files) + 1)
        ]
    total = sum(size(part.spec) for part in parts)
    with log.progress(total=total // _MIB, desc="writing", unit=" MiB") as bar:
        done = 0

        def tensors(file: Sequence[_Part]) -> Iterator[Tensor]:
            nonlocal done
            made = _made(checkpoint, file)
            for part in file:
                yield next(made)  # in one expression: no name holds it while the next is made
                done += size(part.spec)
                bar.update(done // _MIB - bar.n)

        for name, file in zip(names, files, strict=True):
            write_safetensors(folder / name, [part.spec for part in file], tensors(file))
    if len(files) > 1:
        weight_map = {
            part.recipe.name: name for name, file in zip(names, files, strict=True) for part in file
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{SAFETENSORS}.index.json", index)


def _divide(parts: Sequence[_Part], max_bytes: int) -> list[list[_Part]]:
    """Parts in as many files as they need; a tensor that is larger has a file of its own."""
    files: list[list[_Part]] = [[]]
    held = 0
    for part in parts:
        if files[-1] and held + size(part.spec) > max_bytes:
            files.append([])
            held = 0
        files[-1].append(part)
        held += size(part.spec)
    for file in files:  # wide types first: see write_safetensors
        file.sort(key=lambda part: -part.dtype.itemsize)
    return files


def _made(checkpoint: Checkpoint, parts: Sequence[_Part]) -> Iterator[Tensor]:
    """The tensors themselves, one at a time; a layer's files are mapped while it is their turn."""
    for _, group in itertools.groupby(parts, key=lambda part: part.layer.index):
        of_layer = list(group)
        layer = of_layer[0].layer
        stored = {name: (layout, shards) for name, layout, shards in checkpoint.tensors(layer)}
        for part in of_layer:
            if part.recipe.source is None:
                yield torch.zeros(part.recipe.shape, dtype=part.dtype)
            else:
                yield _make(part, *stored[part.recipe.source])


def _make(part: _Part, layout: ParamLayout, shards: Sequence[Tensor]) -> Tensor:
    tensor = part.recipe.make(reshard(shards, layout, 0, 1))
    return tensor if tensor.dtype == part.dtype else cast(tensor, part.dtype)


def _write_texts(
    folder: Path,
    checkpoint: Checkpoint,
    config: NeoXConfig,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
) -> None:
    name = str(dtype).removeprefix("torch.")
    tokens = special_tokens(tokenizer)
    model = config_json(config, checkpoint.padded_vocab_size, name, tokens)
    _write_json(folder / hf.CONFIG, model)
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    if tokenizer is not None:
        for file, data in tokenizer_files(config, tokenizer).items():
            write_bytes(folder / file, data)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
