"""What a transformers folder, given as `load`, brings to a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neox.config import hf
from neox.config.architecture import TRAITS, Trait, same
from neox.config.draft import Draft
from neox.config.fields import keys_of
from neox.config.model import ModelConfig
from neox.config.values import show
from neox.errors import ConfigError

# What was taken, among the files that a run keeps beside its checkpoints: these will be loaded by
# the same files, when the folder is no more what `load` names.
_FILE = "transformers.yml"
_ORIGINS = {hf.CONFIG, *(files["vocab_file"] for files in hf.TOKENIZERS.values())}


def adopt_folder(draft: Draft, *, training: bool) -> None:
    """Take from config.json what nobody else says; report what somebody else says differently.

    The architecture, the tokenizer and, but for training, the precision. For values that were
    accepted already, before those that are missing are reported.
    """
    load = draft.values.get("load")
    if load is None or draft.values.get("iteration") is not None:
        return
    if not hf.is_transformers(Path(load)):
        return
    try:
        folder = hf.read_folder(Path(load))
    except ConfigError as error:
        draft.problem("load", str(error))
        draft.bad |= {name for name, spec in keys_of(ModelConfig).items() if spec.required}
        return
    for trait in TRAITS.values():
        _compare(draft, folder, trait)
    length = draft.values.get("max_position_embeddings", folder.values["max_position_embeddings"])
    _take(draft, "seq_length", length)
    for name, value in folder.values.items():
        if name != "intermediate_size" or "expansion_factor" not in draft.values:
            _take(draft, name, value)
    if not training and not {"precision", "fp16", "bf16"} & (draft.values.keys() | draft.bad):
        _take(draft, "precision", folder.precision)
    if not {"tokenizer_type", "vocab_file", "merge_file"} & (draft.values.keys() | draft.bad):
        _take_tokenizer(draft, folder)
    taken = [key for key, origin in draft.origins.items() if origin in _ORIGINS]
    if taken:
        draft.texts.setdefault(_FILE, hf.yaml_text({key: draft.values[key] for key in taken}))


def _compare(draft: Draft, folder: hf.Folder, trait: Trait) -> None:
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
                f"{folder.path / hf.CONFIG}, which load names. Leave {key} out.",
            )


def _take(draft: Draft, name: str, value: Any, origin: str = hf.CONFIG) -> None:
    if name not in draft.values and name not in draft.bad and value is not None:
        draft.values[name] = value
        draft.origins[name] = origin


def _take_tokenizer(draft: Draft, folder: hf.Folder) -> None:
    if folder.tokenizer is not None:
        kind, files = folder.tokenizer
        origin = files["vocab_file"].name
        _take(draft, "tokenizer_type", kind, origin)
        for key, path in files.items():
            _take(draft, key, str(path), origin)
