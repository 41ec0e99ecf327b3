"""The config.json of the class of transformers that computes what a configuration does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from neox.config.hf import ACTIVATIONS
from neox.config.model import ModelConfig
from neox.config.values import listed
from neox.errors import ConfigError

CLASSES = {
    "gpt_neox": "GPTNeoXForCausalLM",
    "gptj": "GPTJForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}


def model_type(config: ModelConfig) -> str:
    """Of `CLASSES` the one that computes the same function. Raises ConfigError if none does."""
    if config.norm == "rmsnorm":
        kind = "llama" if config.sliding_window_width is None else "mistral"
        reasons = _not_llama(config, kind)
    else:
        kind = _gpt_kind(config)
        reasons = _not_gpt(config, kind)
    if found := [*reasons, *_not_any(config, kind)]:
        raise ConfigError(
            f"no class of transformers that can be written ({listed(CLASSES)}) computes this "
            f"model. {CLASSES[kind]} is nearest to it, but {listed(found, 'and')}."
        )
    return kind


def _gpt_kind(config: ModelConfig) -> str:
    if config.pos_emb == "rotary" and config.rotary_interleaved:
        return "gptj"
    return "gpt2" if config.pos_emb == "learned" else "gpt_neox"


def _not_any(config: ModelConfig, kind: str) -> Iterator[str]:
    """What GPT-J alone has."""
    if kind == "gptj":
        return
    if config.pos_emb == "rotary" and config.rotary_interleaved:
        yield "rotary_interleaved is true (its pairs are half a head apart)"
    if config.no_weight_tying and config.use_bias_in_final_linear:
        yield "use_bias_in_final_linear is true (its output layer has no bias)"


def _not_gpt(config: ModelConfig, kind: str) -> Iterator[str]:
    known = {activation for activation, _ in ACTIVATIONS.values()}
    if config.pos_emb not in ("rotary", "learned"):
        yield f"pos_emb is {config.pos_emb} (it has rotary)"
    if config.activation not in known:
        yield f"activation is {config.activation} (it has {listed(sorted(known))})"
    if config.sliding_window_width is not None:
        yield f"sliding_window_width is {config.sliding_window_width} (it has no window)"
    if kind == "gpt2" and config.gpt_j_residual:
        yield "gpt_j_residual is true (its residual is sequential)"
    if kind == "gptj":
        if not config.gpt_j_residual:
            yield "gpt_j_residual is false (its residual is parallel)"
        elif not config.gpt_j_tied:
            yield "gpt_j_tied is false (one norm feeds both its branches)"
        if config.use_bias_in_attn_linear:
            yield "use_bias_in_attn_linear is true (its attention has no biases)"
        if config.rotary_emb_base != 10000:
            yield f"rotary_emb_base is {config.rotary_emb_base} (it has 10000)"


def _not_llama(config: ModelConfig, kind: str) -> Iterator[str]:
    if config.pos_emb != "rotary":
        yield f"pos_emb is {config.pos_emb} (it has rotary)"
    elif config.rotary_dim != config.head_dim:
        yield f"rotary_pct is {config.rotary_pct:g} (it rotates whole heads)"
    if config.gpt_j_residual:
        yield "gpt_j_residual is true (its residual is sequential)"
    if config.activation != "swiglu":
        yield f"activation is {config.activation} (it has swiglu)"
    if kind == "mistral" and (config.use_bias_in_attn_linear or config.use_bias_in_mlp):
        yield "there are biases (it has none)"


def config_json(
    config: ModelConfig, vocab_size: int, dtype: str, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json for versions 4 and 5 of transformers, which name some things differently.

    `vocab_size` is the embedding's rows, `dtype` torch's name of the weights' type; `tokens` are
    bos_token_id, eos_token_id and pad_token_id. Raises ConfigError as `model_type` does.
    """
    kind = model_type(config)
    own = {
        "gpt_neox": _gpt_neox,
        "gptj": _gptj,
        "gpt2": _gpt2,
        "llama": _llama,
        "mistral": _llama,
    }[kind](config)
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": vocab_size,
        "tie_word_embeddings": not config.no_weight_tying,
        **own,
        **tokens,
        "dtype": dtype,
        "torch_dtype": dtype,  # version 4
    }


def _gpt_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        **_sizes(config),
        "hidden_act": _hidden_act(config),
        "layer_norm_eps": config.layernorm_epsilon,
        "use_parallel_residual": config.gpt_j_residual,
        "attention_bias": config.use_bias_in_attn_linear,
        "hidden_dropout": config.hidden_dropout,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(config.rotary_emb_base),
            "partial_rotary_factor": config.rotary_pct,
        },
        "rotary_pct": config.rotary_pct,  # version 4
        "rotary_emb_base": config.rotary_emb_base,
    }


def _llama(config: ModelConfig) -> dict[str, Any]:
    theta = float(config.rotary_emb_base)
    values = {
        **_sizes(config),
        "hidden_act": "silu",
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.rms_norm_epsilon**2,  # under the root: see docs/numerics.md
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,  # version 4
    }
    if config.sliding_window_width is not None:
        # Theirs counts the token itself.
        return {**values, "sliding_window": config.sliding_window_width + 1}
    biases = {"attention_bias": config.use_bias_in_attn_linear, "mlp_bias": config.use_bias_in_mlp}
    return {**values, **biases}


def _gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_size,
        "n_positions": config.max_position_embeddings,
        "activation_function": _hidden_act(config),
        "layer_norm_epsilon": config.layernorm_epsilon,
        "embd_pdrop": config.hidden_dropout,
        "resid_pdrop": config.hidden_dropout,
        "attn_pdrop": config.attention_dropout,
    }


def _gptj(config: ModelConfig) -> dict[str, Any]:
    # A tied table is written twice: transformers loads no tied output layer that has a bias.
    return {**_gpt2(config), "rotary_dim": config.rotary_dim, "tie_word_embeddings": False}


def _sizes(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_dropout": config.attention_dropout,
    }


def _hidden_act(config: ModelConfig) -> str:
    return "gelu_pytorch_tanh" if config.gelu_approximation == "tanh" else config.activation
