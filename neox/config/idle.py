"""Keys that act, but not beside the others that are given: they get a warning too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from neox.config.config import NeoXConfig
from neox.config.fields import keys_of
from neox.config.values import show

_ROTARY = "only pos_emb: rotary reads it"
_PROFILE = "only profile: true reads it"
_COUNTED = "weight_by_num_documents sets the weights"

# key: when nothing reads it, and why.
_IDLE: dict[str, tuple[Callable[[NeoXConfig], bool], str]] = {
    "gpt_j_tied": (lambda c: not c.gpt_j_residual, "only gpt_j_residual: true reads it"),
    "rotary_pct": (lambda c: c.pos_emb != "rotary", _ROTARY),
    "rotary_emb_base": (lambda c: c.pos_emb != "rotary", _ROTARY),
    "rotary_interleaved": (lambda c: c.pos_emb != "rotary", _ROTARY),
    "use_bias_in_final_linear": (
        lambda c: not c.no_weight_tying,
        "only no_weight_tying: true reads it",
    ),
    "layernorm_epsilon": (lambda c: c.norm != "layernorm", "only norm: layernorm reads it"),
    "rms_norm_epsilon": (lambda c: c.norm != "rmsnorm", "only norm: rmsnorm reads it"),
    "bias_gelu_fusion": (lambda c: c.activation != "gelu", "only activation: gelu reads it"),
    "checkpoint_num_layers": (
        lambda c: not c.checkpoint_activations,
        "only checkpoint_activations: true reads it",
    ),
    "partition_activations": (
        lambda c: not c.checkpoint_activations or c.model_parallel_size == 1 or c.sequence_parallel,
        "only checkpoint_activations: true with a model_parallel_size above 1 reads it, and with "
        "sequence_parallel kept activations are split already",
    ),
    "checkpoint_in_cpu": (
        lambda c: not c.checkpoint_activations,
        "only checkpoint_activations: true reads it",
    ),
    "gradient_predivide_factor": (
        lambda c: not c.prescale_gradients,
        "only prescale_gradients: true reads it",
    ),
    "sequence_parallel": (
        lambda c: c.model_parallel_size == 1,
        "only model_parallel_size above 1 reads it",
    ),
    "lr_decay_fraction": (
        lambda c: c.lr_decay_iters is not None,
        "lr_decay_iters says where the decay ends",
    ),
    "use_checkpoint_lr_scheduler": (lambda c: c.finetune, "finetune starts a schedule anew"),
    "wsd_decay_ratio": (lambda c: c.lr_decay_style != "wsd", "only lr_decay_style: wsd reads it"),
    "wsd_decay_style": (lambda c: c.lr_decay_style != "wsd", "only lr_decay_style: wsd reads it"),
    "weight_by_num_documents": (
        lambda c: not c.train_data_paths,
        "only train_data_paths and the like are weighted",
    ),
    "weighted_sampler_alpha": (
        lambda c: not c.weight_by_num_documents,
        "only weight_by_num_documents: true reads it",
    ),
    "train_data_weights": (lambda c: c.weight_by_num_documents, _COUNTED),
    "valid_data_weights": (lambda c: c.weight_by_num_documents, _COUNTED),
    "test_data_weights": (lambda c: c.weight_by_num_documents, _COUNTED),
    "allow_chopped": (lambda c: c.pack_impl == "packed", "pack_impl: packed always cuts documents"),
    "profile_step_start": (lambda c: not c.profile, _PROFILE),
    "profile_step_stop": (lambda c: not c.profile, _PROFILE),
    "memory_profiling": (lambda c: not c.profile, _PROFILE),
    "memory_profiling_path": (lambda c: not c.memory_profiling, "only memory_profiling reads it"),
    "eval_own_documents": (
        lambda c: c.eval_data_dir is None,
        "only the files of eval_data_dir are compared with those published",
    ),
    "include_path": (lambda c: c.eval_tasks is None, "only eval_tasks names its tasks"),
    "chat_template_path": (
        lambda c: not c.apply_chat_template and not c.finetune_data,
        "only apply_chat_template: true and finetune_data read it",
    ),
    "split": (
        lambda c: bool(c.train_data_paths or c.finetune_data),
        "only data_path is split",
    ),
    "finetune_text_per": (lambda c: not c.finetune_data, "only finetune_data reads it"),
}

# What acts whatever the others say, for these purposes.
_READ_BY = {"chat_template_path": ("serve",)}


def idle_keys(config: NeoXConfig, purpose: str | None = None) -> Iterator[tuple[str, str]]:
    """(key, warning) of every key whose value differs from the default and is not read."""
    keys = keys_of(NeoXConfig)
    for name, (is_idle, why) in _IDLE.items():
        value = getattr(config, name)
        if purpose in _READ_BY.get(name, ()):
            continue
        if value != keys[name].default and is_idle(config):
            yield name, f"{name} is {show(value)}, which does nothing: {why}."
