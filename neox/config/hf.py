"""Transformers folders and what their config.json says, as every version of transformers wrote it.

GPTNeoXForCausalLM is read. neox.config.hf_classes is the other direction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neox.config.fields import keys_of
from neox.config.model import ModelConfig
from neox.config.values import Misfit, fit, listed, show
from neox.errors import ConfigError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")

# What GPTNeoXConfig takes where config.json says nothing.
_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 44,
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "max_position_embeddings": 2048,
    "vocab_size": 50432,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
}

# NeoX's keys, and what config.json calls the same.
_SAME = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "layer_norm_eps",
    "rotary_pct": "rotary_pct",
    "rotary_emb_base": "rotary_emb_base",
    "gpt_j_residual": "use_parallel_residual",
    "use_bias_in_attn_linear": "attention_bias",
}

# What settles those of NeoX's keys that it calls or counts otherwise; others, the class itself.
_SETTLE = {
    "no_weight_tying": "tie_word_embeddings",
    "activation": "hidden_act",
    "bias_gelu_fusion": "hidden_act",
    "num_kv_heads": "num_attention_heads",
    "expansion_factor": "intermediate_size",
    "mlp_multiple_of": "intermediate_size",
}

# Transformers' activations -> `activation` and `bias_gelu_fusion`, which is GELU's tanh form.
ACTIVATIONS = {
    "gelu": ("gelu", False),
    "gelu_python": ("gelu", False),
    "gelu_pytorch_tanh": ("gelu", True),
    "gelu_python_tanh": ("gelu", True),
    "gelu_accurate": ("gelu", True),
    "gelu_fast": ("gelu", True),
    "gelu_new": ("gelu", True),
    "relu": ("relu", False),
    "silu": ("silu", False),
    "swish": ("swish", False),
    "mish": ("mish", False),
}
PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bfloat16"}


def is_transformers(folder: Path) -> bool:
    """Whether a folder holds a model of transformers: config.json, and weights beside it."""
    try:
        return (folder / CONFIG).is_file() and any(
            any(folder.glob(pattern)) for pattern in _WEIGHTS
        )
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


@dataclass(frozen=True)
class Folder:
    """What the config.json of a transformers folder says: `values` are NeoX's keys."""

    path: Path
    values: Mapping[str, Any]  # of `ARCHITECTURE`; those that are left out have NeoX's defaults
    stated: Mapping[str, Any]  # config.json's keys, with transformers' defaults
    vocab_size: int  # rows of the embedding
    precision: str | None  # that the weights were saved in, if told

    @property
    def where(self) -> Path:
        """What says so."""
        return self.path / CONFIG

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, if it has one."""
        path = self.path / TOKENIZER
        return path if path.is_file() else None

    def said(self, name: str) -> str:
        """What config.json says that settles NeoX's key `name`, in its own words."""
        theirs = _SAME.get(name) or _SETTLE.get(name, "model_type")
        return f"{theirs} is {show(self.stated[theirs])}"


def read_folder(folder: Path) -> Folder:
    """Read config.json. Raises ConfigError with everything in it that cannot be computed here."""
    path = folder / CONFIG
    given = read_json(path)
    config = _DEFAULTS | {name: value for name, value in given.items() if value is not None}
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(rope, dict):
        config["rotary_emb_base"] = _whole(rope.get("rope_theta") or config["rotary_emb_base"])
        config["rotary_pct"] = rope.get("partial_rotary_factor") or config["rotary_pct"]
    problems = list(_refusals(config, rope))
    if not problems:
        values, problems = _fitting(config)
    if problems:
        raise ConfigError(f"{path}: {' '.join(problems)}")
    precision = PRECISIONS.get(config.get("dtype") or config.get("torch_dtype") or "")
    return Folder(folder, values, config, config["vocab_size"], precision)


def yaml_text(values: Mapping[str, Any]) -> str:
    """A configuration file of `values`, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a .json file holds. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {show(value)}, but it must be keys with values.")
    return value


def _whole(number: Any) -> Any:
    """10000 for 10000.0, anything else as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _refusals(config: Mapping[str, Any], rope: Any) -> Iterator[str]:
    """What transformers would compute and NeoX's layers cannot."""
    kind, classes = config.get("model_type"), config.get("architectures")
    if kind != "gpt_neox":
        yield f"model_type is {show(kind)}, which does not load. Only gpt_neox does."
        return
    if classes is not None and "GPTNeoXForCausalLM" not in classes:
        yield f"architectures is {show(classes)}, but only GPTNeoXForCausalLM loads."
    scaling = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if scaling != "default":
        yield f"its rotary positions are scaled ({show(scaling)}), which is not supported."
    if not isinstance(config["hidden_act"], str) or config["hidden_act"] not in ACTIVATIONS:
        known = listed(ACTIVATIONS)
        yield f"hidden_act is {show(config['hidden_act'])}, which is not supported. Use {known}."
    if "quantization_config" in config:
        yield "its weights are quantized (quantization_config), which is not supported."


def _fitting(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """NeoX's keys with their values, and what does not fit them."""
    keys, values, problems = keys_of(ModelConfig), {}, []
    for name, theirs in _SAME.items():
        try:
            values[name] = fit(config[theirs], keys[name])
        except Misfit as misfit:
            problems.append(f"{theirs} is {show(config[theirs])}, {misfit}")
    tied, rows = config["tie_word_embeddings"], config["vocab_size"]
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings is {show(tied)}, but it must be true or false.")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        problems.append(f"vocab_size is {show(rows)}, but it must be an integer of 1 or more.")
    activation, is_tanh = ACTIVATIONS[config["hidden_act"]]
    values |= {
        "no_weight_tying": not tied,
        "pos_emb": "rotary",
        "norm": "layernorm",
        "activation": activation,
        "use_bias_in_mlp": True,
    }
    if activation == "gelu":
        values["bias_gelu_fusion"] = is_tanh
    return values, problems
