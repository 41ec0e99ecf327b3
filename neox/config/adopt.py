"""What a folder of another program, given as `load`, brings to a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neox.config import hf, mesh
from neox.config.architecture import TRAITS, Trait, same
from neox.config.draft import Draft
from neox.config.fields import keys_of
from neox.config.model import ModelConfig
from neox.config.values import listed, show
from neox.errors import CheckpointError, ConfigError

# What was taken, among the files that a run keeps beside its checkpoints: these will be loaded by
# the same files, when the folder is no more what `load` names.
_FILE = "transformers.yml"
_MESH = "mesh-transformer-jax"
_ORIGINS = {hf.CONFIG, _MESH, *(files["vocab_file"] for files in hf.TOKENIZERS.values())}


def adopt_folder(draft: Draft, *, training: bool) -> None:
    """Take from the folder what nobody else says; report what somebody else says differently.

    The architecture, the tokenizer and, but for training, the precision. For values that were
    accepted already, before those that are missing are reported.
    """
    load = draft.values.get("load")
    if load is None or draft.values.get("iteration") is not None:
        return
    try:
        folder = _read(draft, Path(load))
    except (ConfigError, CheckpointError) as error:
        draft.problem("load", str(error))
        draft.bad |= {name for name, spec in keys_of(ModelConfig).items() if spec.required}
        return
    if folder is None:
        return
    for trait in TRAITS.values():
        _compare(draft, folder, trait)
    origin = hf.CONFIG if isinstance(folder, hf.Folder) else _MESH
    length = draft.values.get("max_position_embeddings", folder.values["max_position_embeddings"])
    _take(draft, "seq_length", length, origin)
    for name, value in folder.values.items():
        if name != "intermediate_size" or "expansion_factor" not in draft.values:
            _take(draft, name, value, origin)
    if not training and not {"precision", "fp16", "bf16"} & (draft.values.keys() | draft.bad):
        _take(draft, "precision", folder.precision, origin)
    if not {"tokenizer_type", "vocab_file", "merge_file"} & (draft.values.keys() | draft.bad):
        _take_tokenizer(draft, folder)
    taken = [key for key, origin in draft.origins.items() if origin in _ORIGINS]
    if taken:
        draft.texts.setdefault(_FILE, hf.yaml_text({key: draft.values[key] for key in taken}))


def _read(draft: Draft, path: Path) -> hf.Folder | mesh.Folder | None:
    """None for a folder of this program's or of NeoX's. Raises ConfigError and CheckpointError."""
    if hf.is_transformers(path):
        return hf.read_folder(path)
    if not mesh.is_mesh(path):
        return None
    folder = mesh.read_folder(path, draft.values)
    if folder.untold:
        missing = [key for key in folder.untold if key not in draft.bad] or folder.untold
        raise ConfigError(
            f"{path} does not tell {listed(missing, 'and')}, and its model is not GPT-J-6B, whose "
            f"width is {mesh.WIDTH_OF_6B}: give the values that it was trained with."
        )
    return folder


def _compare(draft: Draft, folder: hf.Folder | mesh.Folder, trait: Trait) -> None:
    """Report every given key that by itself makes the model another than the folder's."""
    theirs = ModelConfig(**folder.values, seq_length=1)
    for key in trait.keys:
        if key not in draft.values or not trait.matters(theirs):
            continue
        given = {key: draft.values[key]}
        if key == "expansion_factor":
            given["intermediate_size"] = None
        ours = ModelConfig(**{**folder.values, **given}, seq_length=1)
        if not same(trait.value(ours), trait.value(theirs)):
            draft.problem(
                key,
                f"{key} is {show(given[key])}, but {folder.said(key)} in "
                f"{folder.where}, which load names. Leave {key} out.",
            )


def _take(draft: Draft, name: str, value: Any, origin: str) -> None:
    if name not in draft.values and name not in draft.bad and value is not None:
        draft.values[name] = value
        draft.origins[name] = origin


def _take_tokenizer(draft: Draft, folder: hf.Folder | mesh.Folder) -> None:
    if folder.tokenizer is not None:
        kind, files = folder.tokenizer
        origin = files["vocab_file"].name
        _take(draft, "tokenizer_type", kind, origin)
        for key, path in files.items():
            _take(draft, key, str(path), origin)
