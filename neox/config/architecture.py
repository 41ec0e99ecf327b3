"""What defines the function a model computes: the keys, and what their values mean together.

Configurations are compared by traits: `intermediate_size` left out and four times the width are one
`ffn_size`, `silu` and `swish` one activation, and no rotary key matters without rotary positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from neox.config.fields import REQUIRED, keys_of
from neox.config.model import ModelConfig
from neox.config.values import Misfit, fit

# Not seq_length, dropout or initialisation: they act on training, and on what may be fed.
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_kv_heads",
    "sliding_window_width",
    "pos_emb",
    "max_position_embeddings",
    "rotary_pct",
    "rotary_emb_base",
    "rotary_interleaved",
    "norm",
    "layernorm_epsilon",
    "rms_norm_epsilon",
    "activation",
    "bias_gelu_fusion",
    "intermediate_size",
    "expansion_factor",
    "mlp_multiple_of",
    "gpt_j_residual",
    "gpt_j_tied",
    "use_bias_in_attn_linear",
    "use_bias_in_mlp",
    "no_weight_tying",
    "use_bias_in_final_linear",
)
_KEYS = {key: spec for key, spec in keys_of(ModelConfig).items() if key in ARCHITECTURE}
DEFAULTS = {key: spec.default for key, spec in _KEYS.items() if spec.default is not REQUIRED}
_SYNONYMS = {"silu": "swish", "te_layernorm": "layernorm", "te_rmsnorm": "rmsnorm"}
_PLACEHOLDERS = dict.fromkeys((k for k, s in keys_of(ModelConfig).items() if s.required), 1)


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The values of `ARCHITECTURE`'s keys: numbers, words and None."""
    return {key: getattr(config, key) for key in ARCHITECTURE}


def fitting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `values` that are set, belong to `ARCHITECTURE`, and fit their keys.

    Values that this project does not compute with are kept: a model may have them. Synonyms become
    one word.
    """
    fitted = {}
    for key, spec in _KEYS.items():
        try:
            value = fit(values.get(key), replace(spec, refused={}))
        except Misfit:
            continue
        if value is not None:
            fitted[key] = _SYNONYMS.get(value, value)
    return fitted


def _always(config: ModelConfig) -> bool:
    return True


def _heads_divide(config: ModelConfig) -> bool:
    return config.hidden_size % config.num_attention_heads == 0


def _is_rotary(config: ModelConfig) -> bool:
    return config.pos_emb == "rotary"


@dataclass(frozen=True)
class Trait:
    """One property of the function; `keys` set it, and with `reads` besides it can be told.

    `implies` are the key's values that a value of the trait leads to, where other traits depend on
    them.
    """

    name: str
    keys: tuple[str, ...]
    value: Callable[[ModelConfig], Any]
    reads: tuple[str, ...] = ()
    matters: Callable[[ModelConfig], bool] = _always
    implies: Callable[[Any], dict[str, Any]] = lambda value: {}


def _key(name: str, **rules: Any) -> Trait:
    """A key whose value is the trait."""

    def value(config: ModelConfig) -> Any:
        found = getattr(config, name)
        return _SYNONYMS.get(found, found)

    return Trait(name, (name,), value, implies=lambda value: {name: value}, **rules)


# In an order in which each depends on earlier ones only.
TRAITS = {
    trait.name: trait
    for trait in (
        _key("num_layers"),
        _key("hidden_size"),
        _key("num_attention_heads"),
        Trait(
            "kv_width",  # of all heads' keys together
            ("num_kv_heads",),
            lambda config: config.kv_heads * config.head_dim,
            reads=("num_attention_heads", "hidden_size"),
            matters=_heads_divide,
        ),
        _key("sliding_window_width"),
        _key("pos_emb"),
        Trait(
            "has_learned_positions",
            ("pos_emb",),
            lambda config: config.pos_emb == "learned",
            implies=lambda value: {"pos_emb": "learned" if value else "none"},
        ),
        _key(
            "max_position_embeddings",
            reads=("pos_emb",),
            matters=lambda config: config.pos_emb == "learned",
        ),
        Trait(
            "rotary_dim",
            ("rotary_pct",),
            lambda config: config.rotary_dim,
            reads=("pos_emb", "num_attention_heads", "hidden_size"),
            matters=lambda config: _is_rotary(config) and _heads_divide(config),
        ),
        _key("rotary_emb_base", reads=("pos_emb",), matters=_is_rotary),
        _key("rotary_interleaved", reads=("pos_emb",), matters=_is_rotary),
        _key("norm"),
        _key(
            "layernorm_epsilon",
            reads=("norm",),
            matters=lambda config: config.norm == "layernorm",
        ),
        _key(
            "rms_norm_epsilon",
            reads=("norm",),
            matters=lambda config: config.norm == "rmsnorm",
        ),
        _key("activation"),
        Trait(
            "is_gated",
            ("activation",),
            lambda config: config.is_gated,
            implies=lambda value: {"activation": "swiglu" if value else "relu"},
        ),
        _key(
            "bias_gelu_fusion",
            reads=("activation",),
            matters=lambda config: config.activation == "gelu",
        ),
        Trait(
            "ffn_size",
            ("intermediate_size", "expansion_factor", "mlp_multiple_of"),
            lambda config: config.ffn_size,
            reads=("activation", "hidden_size"),
        ),
        _key("gpt_j_residual"),
        _key(
            "gpt_j_tied",
            reads=("gpt_j_residual",),
            matters=lambda config: config.gpt_j_residual,
        ),
        _key("use_bias_in_attn_linear"),
        _key("use_bias_in_mlp"),
        _key("no_weight_tying"),
        _key(
            "use_bias_in_final_linear",
            reads=("no_weight_tying",),
            matters=lambda config: config.no_weight_tying,
        ),
    )
}


def same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether two values of a trait are one, as far as they can be known (relative tolerance).

    Numbers with a fraction may have been float32 once.
    """
    if tolerance or isinstance(one, float):
        return math.isclose(one, other, rel_tol=max(tolerance, 1e-6))
    return bool(one == other)


def traits(values: Mapping[str, Any]) -> dict[str, Any]:
    """The traits that matter and that `values`, of some or all keys of `ARCHITECTURE`, tell."""
    config = ModelConfig(**{**_PLACEHOLDERS, **values})
    return {
        trait.name: trait.value(config)
        for trait in TRAITS.values()
        if _covers(values, trait) and trait.matters(config)
    }


def open_keys(known: Mapping[str, Any]) -> list[str]:
    """The keys that would have to be known besides the traits `known`, by name."""
    told = {key: value for key, value in known.items() if key in ARCHITECTURE}
    config = ModelConfig(**{**_PLACEHOLDERS, **told})
    missing = [
        trait.keys[0]
        for trait in TRAITS.values()
        if trait.matters(config) and not {trait.name, trait.keys[0]} & known.keys()
    ]
    return list(dict.fromkeys(missing))


def _covers(values: Collection[str], trait: Trait) -> bool:
    return all(key in values for key in (*trait.keys, *trait.reads))
