"""What PEFT calls the tensors of a model, and which rows of ours are in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neox.checkpoint.hf.names import NAMINGS
from neox.checkpoint.hf.tensors import recipes
from neox.checkpoint.peft.adapters import Name
from neox.config import NeoXConfig
from neox.config.frozen import TARGETS
from neox.config.hf_classes import model_type
from neox.errors import ConfigError
from neox.model.gpt import layers
from neox.model.layout import ParamLayout
from neox.parallel.groups import ProcessGroups

PREFIX = "base_model.model."  # of every name in PEFT's files

# GPTNeoXForCausalLM's output projection in transformers 4, and in 5, which reads the former's
# weights; PEFT takes an adapter by the name that the module has.
HEAD, HEAD_5 = "embed_out", "lm_head"


@dataclass(frozen=True)
class Part:
    """A parameter of transformers' model that is made of rows of one of ours, in this order.

    Row i of theirs is row `rows[i]` of ours. `name` is that of the parameter.
    """

    name: str
    index: int
    source: str
    layout: ParamLayout
    rows: Tensor

    @property
    def key(self) -> Name:
        return self.index, self.source

    @property
    def module(self) -> str:
        """Theirs."""
        return self.name.rpartition(".")[0]

    @property
    def modules(self) -> tuple[str, ...]:
        """Every name that theirs has."""
        return (HEAD, HEAD_5) if self.module == HEAD else (self.module,)

    @property
    def matrix(self) -> str | None:
        """Our name of the matrix, where it is the weight of one that can have an adapter."""
        module, _, kind = self.source.rpartition(".")
        return module if kind == "weight" and module in TARGETS.values() else None


def parts(config: NeoXConfig, padded_vocab_size: int) -> Iterator[Part]:
    """Every parameter that our export has of ours, in the order of the layers.

    A parameter of ours may have several: GPT-J's queries, keys and values; copies of a norm.
    """
    kind = naming(config)
    for layer in layers(config, padded_vocab_size, torch.float32, ProcessGroups.single()):
        if not layer.has_file:
            continue
        assert layer.layout is not None
        for recipe in recipes(config, kind, layer):
            if recipe.source is not None:
                layout = layer.layout[recipe.source]
                rows = recipe.make(torch.arange(layout.shape[0]))
                yield Part(recipe.name, layer.index, recipe.source, layout, rows)


def naming(config: NeoXConfig) -> str:
    """Of NAMINGS that in which adapters of the model are written: gpt_neox's, if it has none."""
    try:
        kind = model_type(config)
    except ConfigError:
        return "gpt_neox"
    return kind if kind in NAMINGS else "gpt_neox"


def why_not_loadable(config: NeoXConfig) -> str | None:
    """Why PEFT has no model to load such adapters onto; None where it has."""
    try:
        kind = model_type(config)
    except ConfigError as error:
        return str(error)
    if kind in NAMINGS:
        return None
    return f"the model is exported as {kind}, of which PEFT's names are not known here."


def short(module: str) -> str:
    """The name of a module of theirs in its parent: query_key_value."""
    return module.rpartition(".")[2]
