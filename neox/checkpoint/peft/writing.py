"""Adapters as the folder that PEFT loads onto our export."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save
from torch import Tensor

from neox import log
from neox.checkpoint.directory import write_file
from neox.checkpoint.manifest import Entry
from neox.checkpoint.peft.adapters import SAFETENSORS, SETTINGS, Adapters, Name, half, is_norm
from neox.checkpoint.peft.names import HEAD, PREFIX, Part, parts, short, why_not_loadable
from neox.config import NeoXConfig
from neox.model.lora import AdapterSpec

V = TypeVar("V")


def write_adapters(
    folder: Path, config: NeoXConfig, adapters: Adapters, base: str | None
) -> dict[str, Entry]:
    """Write `adapters` into `folder`; what was written, by file name. Not collective.

    PEFT computes our logits from them on the export of the checkpoint that they are for; a model
    that transformers does not compute has GPTNeoXForCausalLM's names, and a line says so. `base`
    is where PEFT is told the base is. Equal adapters are equal bytes. Memory holds them twice.
    Raises OSError.
    """
    if reason := why_not_loadable(config):
        log.info(f"PEFT cannot load the adapters onto a model of transformers: {reason}")
    everything = list(parts(config, _vocabulary(adapters)))
    tensors = _tensors(adapters, everything)
    settings = _settings(adapters, everything, base)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    return {
        SETTINGS: write_file(folder / SETTINGS, text.encode()),
        SAFETENSORS: write_file(folder / SAFETENSORS, save(tensors, {"format": "pt"})),
    }


def _vocabulary(adapters: Adapters) -> int:
    """Rows of the output projection's tensors; one, which nobody needs, where there are none."""
    rows = (t.shape[0] for (_, name), t in adapters.tensors.items() if _is_head(name))
    return next(rows, 1)


def _is_head(name: str) -> bool:
    return name in (half("final_linear", "B"), "final_linear.bias")


def _tensors(adapters: Adapters, everything: list[Part]) -> dict[str, Tensor]:
    """By PEFT's names. Parts of one matrix share A, of which each has a copy."""
    found: dict[str, Tensor] = {}
    done: set[Name] = set()
    for part in everything:
        if (part.index, part.matrix) in adapters.specs:
            assert part.matrix is not None
            keys = [(part.index, half(part.matrix, letter)) for letter in "AB"]
            down, up = (adapters.tensors[key].detach().cpu() for key in keys)
            for module in part.modules:
                found[f"{PREFIX}{module}.lora_A.weight"] = down.clone()
                found[f"{PREFIX}{module}.lora_B.weight"] = up[part.rows]
            done.update(keys)
        elif part.key in adapters.tensors:
            module, _, kind = part.name.rpartition(".")
            owner = part.source.rpartition(".")[0]
            if (part.index, owner) in adapters.specs:  # PEFT has put its own module around it
                module += ".base_layer"
            whole = adapters.tensors[part.key].detach().cpu()
            found[f"{PREFIX}{module}.{kind}"] = whole[part.rows]
            done.add(part.key)
    assert done == adapters.tensors.keys(), f"of another model: {done ^ adapters.tensors.keys()}"
    return found


def _settings(adapters: Adapters, everything: list[Part], base: str | None) -> dict[str, Any]:
    specs: dict[str, AdapterSpec] = {}
    saved: set[str] = set()
    has_bias = False
    for part in everything:
        if spec := adapters.specs.get((part.index, part.matrix or "")):
            specs[part.module] = spec
        elif part.key in adapters.tensors:
            if is_norm(part.source) and not part.source.endswith(".bias"):
                saved.add(part.module)
            else:
                has_bias |= not _belongs_to_saved(part, adapters)
    ranks = {module: spec.rank for module, spec in specs.items()}
    alphas = {module: _alpha(spec) for module, spec in specs.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    modules = [part.module for part in everything]
    heads = [name for part in everything if part.module in specs for name in part.modules[1:]]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max((spec.dropout for spec in specs.values()), default=0.0),
        "target_modules": sorted({*_shortened(dict.fromkeys(specs, True), modules), *heads}),
        "rank_pattern": _pattern(ranks, rank, modules),
        "alpha_pattern": _pattern(alphas, alpha, modules),
        "bias": "all" if has_bias else "none",
        "modules_to_save": sorted(_shortened(dict.fromkeys(saved, True), modules)) or None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
    }


def _belongs_to_saved(part: Part, adapters: Adapters) -> bool:
    """Whether it is the bias of a norm whose weight was trained, too: PEFT saves them together."""
    return is_norm(part.source) and (
        (part.index, part.source.removesuffix("bias") + "weight") in adapters.tensors
    )


def _alpha(spec: AdapterSpec) -> float:
    """alpha with alpha / rank == scaling; an integer where it was one."""
    product = spec.scaling * spec.rank
    return round(product) if round(product) / spec.rank == spec.scaling else product


def _usual(values: Mapping[str, V]) -> V:
    """What r and lora_alpha are; others stand in the patterns.

    The output projection's, as a pattern would have to match either of its names, and PEFT warns
    of one that matches nothing.
    """
    if HEAD in values:
        return values[HEAD]
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, V], usual: V, modules: list[str]) -> dict[str, V]:
    return {name: value for name, value in _shortened(values, modules).items() if value != usual}


def _shortened(values: Mapping[str, V], modules: list[str]) -> dict[str, V]:
    """By the last part of a module's name, where all of the model's that end so have one value."""
    found: dict[str, V] = {}
    for end in dict.fromkeys(map(short, values)):
        alike = [module for module in dict.fromkeys(modules) if short(module) == end]
        if all(module in values and values[module] == values[alike[0]] for module in alike):
            found[end] = values[alike[0]]
        else:
            found |= {module: values[module] for module in alike if module in values}
    return found
