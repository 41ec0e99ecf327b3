"""What a class of transformers calls our tensors; those of the classes that are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Names = dict[str, tuple[str, ...]]  # our tensor's -> theirs; several are parts of ours


@dataclass(frozen=True)
class Naming:
    """The names of one class, by our layer indices. They are the same in every kind of file."""

    # Of a depth: what the names of each layer's tensors begin with, in transformers and here.
    prefixes: Callable[[int], dict[int, tuple[str, str]]]
    # The modules of a transformer layer that have another name there, ours -> theirs.
    modules: Mapping[str, tuple[str, ...]]
    # What transformers 5 calls the output layer in memory, and in torch.save of that.
    head: str = "lm_head."

    def of(self, depth: int, index: int, ours: str) -> tuple[str, ...]:
        """Their names of the tensor `ours` of layer `index`."""
        theirs, prefix = self.prefixes(depth)[index]
        module, _, kind = ours.removeprefix(prefix).rpartition(".")
        if not module:
            return (theirs + kind,)
        return tuple(f"{theirs}{name}.{kind}" for name in self.modules.get(module, (module,)))

    def sort(self, found: Collection[str], depth: int) -> dict[int, Names]:
        """The tensors of each layer among those `found`. Names of no module keep theirs.

        A tensor of ours has all its parts' names, if one of them was found.
        """
        modules = {part: ours for ours, parts in self.modules.items() for part in parts}
        layers: dict[int, Names] = {}
        prefixes = self.prefixes(depth)
        if any(name.startswith(self.head) for name in found):
            prefixes[depth + 4] = (self.head, prefixes[depth + 4][1])
        for index, (theirs, prefix) in prefixes.items():
            names = layers[index] = {}
            for name in found:
                if name.startswith(theirs):
                    module, dot, kind = name.removeprefix(theirs).rpartition(".")
                    ours = prefix + modules.get(module, module) + dot + kind
                    is_known = module in modules
                    names[ours] = self.of(depth, index, ours) if is_known else (name,)
        return layers


def _gpt_neox(depth: int) -> dict[int, tuple[str, str]]:
    return {
        0: ("gpt_neox.embed_in.", "word_embeddings."),
        **{i + 2: (f"gpt_neox.layers.{i}.", "") for i in range(depth)},
        depth + 3: ("gpt_neox.final_layer_norm.", "norm."),
        depth + 4: ("embed_out.", "final_linear."),
    }


def _gptj(depth: int) -> dict[int, tuple[str, str]]:
    return {
        0: ("transformer.wte.", "word_embeddings."),
        **{i + 2: (f"transformer.h.{i}.", "") for i in range(depth)},
        depth + 3: ("transformer.ln_f.", "norm."),
        depth + 4: ("lm_head.", "final_linear."),
    }


NAMINGS = {
    "gpt_neox": Naming(
        _gpt_neox,
        {"mlp.linear1": ("mlp.dense_h_to_4h",), "mlp.linear2": ("mlp.dense_4h_to_h",)},
    ),
    "gptj": Naming(
        _gptj,
        {
            "input_layernorm": ("ln_1",),
            "attention.query_key_value": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
            "attention.dense": ("attn.out_proj",),
            "mlp.linear1": ("mlp.fc_in",),
            "mlp.linear2": ("mlp.fc_out",),
        },
    ),
}


def interleave(heads: int, parts: Sequence[Tensor]) -> Tensor:
    """All heads' queries, all keys and all values -> for each head its query, key and value.

    Each part is [heads x D, ...], the result [heads x 3 x D, ...].
    """
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)
