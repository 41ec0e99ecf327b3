"""What a transformers folder, given as `load`, brings to a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neox.config import hf
from neox.config.draft import Draft
from neox.config.fields import keys_of
from neox.config.model import ModelConfig
from neox.config.values import show
from neox.errors import ConfigError


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
    expected = dict(folder.values)
    length = draft.values.get("max_position_embeddings", expected.pop("max_position_embeddings"))
    _take(draft, "max_position_embeddings", length)
    _take(draft, "seq_length", length)
    _settle_inner_width(draft, folder, expected.pop("intermediate_size"))
    for name, theirs in expected.items():
        if name in draft.values:
            _compare(draft, folder, name, theirs)
        elif name not in draft.bad:
            _take(draft, name, theirs)
    for name, theirs in folder.fixed.items():
        if name in draft.values:
            _compare(draft, folder, name, theirs)
    if not training and not {"precision", "fp16", "bf16"} & (draft.values.keys() | draft.bad):
        _take(draft, "precision", folder.precision)
    _take_tokenizer(draft, folder)


def _take(draft: Draft, name: str, value: Any) -> None:
    if name not in draft.values and name not in draft.bad and value is not None:
        draft.values[name] = value
        draft.origins[name] = hf.CONFIG


def _compare(draft: Draft, folder: hf.Folder, name: str, theirs: Any) -> None:
    if draft.values[name] != theirs:
        _contradiction(draft, folder, name, f"makes it {show(theirs)}")


def _contradiction(
    draft: Draft, folder: hf.Folder, name: str, effect: str, said: str | None = None
) -> None:
    draft.problem(
        name,
        f"{name} is {show(draft.values[name])}, but {said or folder.said[name]} in "
        f"{folder.config}, which load names, {effect}. Leave {name} out.",
    )


def _settle_inner_width(draft: Draft, folder: hf.Folder, theirs: int) -> None:
    """The MLP's inner width, which three keys set together."""
    said, values = folder.said["intermediate_size"], draft.values
    multiple = values.get("mlp_multiple_of", 1)
    if theirs % multiple:
        _contradiction(draft, folder, "mlp_multiple_of", "is no multiple of it", said)
    if "intermediate_size" in values:
        _compare(draft, folder, "intermediate_size", theirs)
    elif "expansion_factor" not in values:
        _take(draft, "intermediate_size", theirs)
    elif int(values["expansion_factor"] * folder.values["hidden_size"]) != theirs:
        effect = f"makes it {theirs / folder.values['hidden_size']:g}"
        _contradiction(draft, folder, "expansion_factor", effect, said)


def _take_tokenizer(draft: Draft, folder: hf.Folder) -> None:
    """The folder's tokenizer, unless one is named."""
    named = {"tokenizer_type", "vocab_file", "merge_file"} & (draft.values.keys() | draft.bad)
    if folder.tokenizer is not None and not named:
        draft.values |= {"tokenizer_type": "HFTokenizer", "vocab_file": str(folder.tokenizer)}
        draft.origins |= dict.fromkeys(("tokenizer_type", "vocab_file"), hf.TOKENIZER)
