"""Transformers folders and what their config.json says, as every version of transformers wrote it.

GPTNeoXForCausalLM and GPTJForCausalLM are read. neox.config.hf_classes is the other direction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from neox.config.fields import keys_of
from neox.config.model import ModelConfig
from neox.config.values import Misfit, fit, listed, show
from neox.errors import ConfigError

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
# The kinds of tokenizers that a folder may have, the first that is there, and their files.
TOKENIZERS = {
    "HFTokenizer": {"vocab_file": TOKENIZER},
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
}
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")

Config = dict[str, Any]  # config.json's keys with their values


@dataclass(frozen=True)
class Class:
    """A class of transformers whose folders are read, and what its config.json calls things."""

    name: str
    defaults: Mapping[str, Any]  # what its configuration takes where config.json says nothing
    same: Mapping[str, str]  # NeoX's keys, and what config.json calls the same
    settle: Mapping[str, str]  # what settles those of NeoX's keys that it calls or counts otherwise
    activation: str  # the key of that name, which settles `activation` and `bias_gelu_fusion`
    fixed: Mapping[str, Any]  # NeoX's keys that the class itself settles
    # (config, given): set `rotary_pct` and the like in `config`, tell what cannot be computed.
    rotary: Callable[[Config, Config], Iterator[str]]
    synonyms: Mapping[str, str] = field(default_factory=dict)  # of config.json's keys

    def said(self, name: str, stated: Mapping[str, Any]) -> str:
        """What config.json says that settles NeoX's key `name`, in its own words."""
        acts = dict.fromkeys(("activation", "bias_gelu_fusion"), self.activation)
        theirs = {**self.same, **acts, **self.settle}.get(name, "model_type")
        return f"{theirs} is {show(stated[theirs])}"


def _scaled_rotary(config: Config, given: Config) -> Iterator[str]:
    """Of transformers 4's two keys and 5's one, which may ask for other angles than NeoX's."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(rope, dict):
        config["rotary_emb_base"] = _whole(rope.get("rope_theta") or config["rotary_emb_base"])
        config["rotary_pct"] = rope.get("partial_rotary_factor") or config["rotary_pct"]
    scaling = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if scaling != "default":
        yield f"its rotary positions are scaled ({show(scaling)}), which is not supported."


def _rotary_by_width(config: Config, given: Config) -> Iterator[str]:
    """The dimensions that turn as a share of a head; null is no number that transformers runs."""
    hidden, heads = config["n_embd"], config["n_head"]
    dim: Any = given.get("rotary_dim", config["rotary_dim"])
    config["rotary_pct"] = 1.0
    if not _is_count(hidden) or not _is_count(heads):
        return  # told with the others
    if hidden % heads:
        yield f"n_embd is {hidden}, which n_head ({heads}) does not divide."
    elif not _is_count(dim) or dim % 2 or dim > hidden // heads:
        yield (
            f"rotary_dim is {show(dim)}, but it must be an even number up to {hidden // heads}, a "
            "head's dimensions."
        )
    else:
        share, head = dim / (hidden // heads), hidden // heads
        # ModelConfig.rotary_dim takes the integer part, and 2 / 98 x 98 is a little below 2.
        config["rotary_pct"] = share if int(head * share) == dim else math.nextafter(share, 1.0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _whole(number: Any) -> Any:
    """10000 for 10000.0, anything else as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


READ = {
    "gpt_neox": Class(
        "GPTNeoXForCausalLM",
        defaults={
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
        },
        same={
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
        },
        settle={
            "no_weight_tying": "tie_word_embeddings",
            "num_kv_heads": "num_attention_heads",
            "expansion_factor": "intermediate_size",
            "mlp_multiple_of": "intermediate_size",
        },
        activation="hidden_act",
        fixed={"pos_emb": "rotary", "norm": "layernorm", "use_bias_in_mlp": True},
        rotary=_scaled_rotary,
    ),
    "gptj": Class(
        "GPTJForCausalLM",
        defaults={
            "n_layer": 28,
            "n_embd": 4096,
            "n_head": 16,
            "n_inner": None,  # four times n_embd
            "n_positions": 2048,
            "vocab_size": 50400,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "rotary_dim": 64,
            "tie_word_embeddings": False,
        },
        same={
            "num_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "layernorm_epsilon": "layer_norm_epsilon",
            "rotary_pct": "rotary_pct",
        },
        settle={
            "rotary_pct": "rotary_dim",
            "num_kv_heads": "n_head",
            "expansion_factor": "n_inner",
            "mlp_multiple_of": "n_inner",
        },
        activation="activation_function",
        fixed={
            "pos_emb": "rotary",
            "rotary_emb_base": 10000,
            "rotary_interleaved": True,
            "norm": "layernorm",
            "gpt_j_residual": True,
            "gpt_j_tied": True,
            "use_bias_in_attn_linear": False,
            "use_bias_in_mlp": True,
            # A bias that the embedding has not: also with tie_word_embeddings a layer of its own.
            "use_bias_in_final_linear": True,
            "no_weight_tying": True,
        },
        rotary=_rotary_by_width,
        synonyms={
            "num_hidden_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    ),
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
    kind: Class
    values: Mapping[str, Any]  # of `ARCHITECTURE`; those that are left out have NeoX's defaults
    stated: Mapping[str, Any]  # config.json's keys, with transformers' defaults
    vocab_size: int  # rows of the embedding
    precision: str | None  # that the weights were saved in, if told

    @property
    def where(self) -> Path:
        """What says so."""
        return self.path / CONFIG

    @property
    def tokenizer(self) -> tuple[str, dict[str, Path]] | None:
        """Its tokenizer, if it has one: the type, and the files by the keys that name them."""
        for kind, files in TOKENIZERS.items():
            paths = {key: self.path / file for key, file in files.items()}
            if all(path.is_file() for path in paths.values()):
                return kind, paths
        return None

    @property
    def model_type(self) -> str:
        """Of `READ`."""
        return str(self.stated["model_type"])

    def said(self, name: str) -> str:
        """What config.json says that settles NeoX's key `name`, in its own words."""
        return self.kind.said(name, self.stated)


def read_folder(folder: Path) -> Folder:
    """Read config.json. Raises ConfigError with everything in it that cannot be computed here."""
    path = folder / CONFIG
    given = read_json(path)
    kind = READ.get(name) if isinstance(name := given.get("model_type"), str) else None
    if kind is None:
        raise ConfigError(
            f"{path}: model_type is {show(name)}, which does not load. Only {listed(READ, 'and')} "
            "do."
        )
    given = {kind.synonyms.get(name, name): value for name, value in given.items()}
    config = {
        **kind.defaults,
        **{name: value for name, value in given.items() if value is not None},
    }
    problems = [*kind.rotary(config, given), *_refusals(kind, config)]
    if not problems:
        values, problems = _fitting(kind, config)
    if problems:
        raise ConfigError(f"{path}: {' '.join(problems)}")
    precision = PRECISIONS.get(config.get("dtype") or config.get("torch_dtype") or "")
    return Folder(folder, kind, values, config, config["vocab_size"], precision)


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


def _refusals(kind: Class, config: Config) -> Iterator[str]:
    """What transformers would compute and NeoX's layers cannot."""
    classes = config.get("architectures")
    if classes is not None and kind.name not in classes:
        yield f"architectures is {show(classes)}, but only {kind.name} loads."
    activation = config[kind.activation]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        known = listed(ACTIVATIONS)
        yield f"{kind.activation} is {show(activation)}, which is not supported. Use {known}."
    if "quantization_config" in config:
        yield "its weights are quantized (quantization_config), which is not supported."


def _fitting(kind: Class, config: Config) -> tuple[dict[str, Any], list[str]]:
    """NeoX's keys with their values, and what does not fit them."""
    keys, values, problems = keys_of(ModelConfig), {}, []
    for name, theirs in kind.same.items():
        try:
            values[name] = fit(config[theirs], keys[name])
        except Misfit as misfit:
            problems.append(f"{theirs} is {show(config[theirs])}, {misfit}")
    tied, rows = config["tie_word_embeddings"], config["vocab_size"]
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings is {show(tied)}, but it must be true or false.")
    if not _is_count(rows):
        problems.append(f"vocab_size is {show(rows)}, but it must be an integer of 1 or more.")
    activation, is_tanh = ACTIVATIONS[config[kind.activation]]
    values |= {"no_weight_tying": not tied, "activation": activation, **kind.fixed}
    if activation == "gelu":
        values["bias_gelu_fusion"] = is_tanh
    return {name: value for name, value in values.items() if value is not None}, problems
