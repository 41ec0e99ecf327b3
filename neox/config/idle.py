"""Keys that act, but not beside the others that are given: they get a warning too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from neox.config.config import NeoXConfig
from neox.config.fields import keys_of
from neox.config.values import show

_ROTARY = "only pos_emb: rotary reads it"

# key: when nothing reads it, and why.
_IDLE: dict[str, tuple[Callable[[NeoXConfig], bool], str]] = {
    "gpt_j_tied": (lambda c: not c.gpt_j_residual, "only gpt_j_residual: true reads it"),
    "rotary_pct": (lambda c: c.pos_emb != "rotary", _ROTARY),
    "rotary_emb_base": (lambda c: c.pos_emb != "rotary", _ROTARY),
    "layernorm_epsilon": (lambda c: c.norm != "layernorm", "only norm: layernorm reads it"),
    "rms_norm_epsilon": (lambda c: c.norm != "rmsnorm", "only norm: rmsnorm reads it"),
    "bias_gelu_fusion": (lambda c: c.activation != "gelu", "only activation: gelu reads it"),
    "checkpoint_num_layers": (
        lambda c: not c.checkpoint_activations,
        "only checkpoint_activations: true reads it",
    ),
    "gradient_predivide_factor": (
        lambda c: not c.prescale_gradients,
        "only prescale_gradients: true reads it",
    ),
    "lr_decay_fraction": (
        lambda c: c.lr_decay_iters is not None,
        "lr_decay_iters says where the decay ends",
    ),
    "split": (lambda c: bool(c.train_data_paths), "only data_path is split"),
}


def idle_keys(config: NeoXConfig) -> Iterator[tuple[str, str]]:
    """(key, warning) of every key whose value differs from the default and is not read."""
    keys = keys_of(NeoXConfig)
    for name, (is_idle, why) in _IDLE.items():
        value = getattr(config, name)
        if value != keys[name].default and is_idle(config):
            yield name, f"{name} is {show(value)}, which does nothing: {why}."
