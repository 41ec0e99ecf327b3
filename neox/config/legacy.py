"""Keys that other versions and forks have, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator

from neox.config.fields import keys_of
from neox.config.optimizer_params import OPTIMIZER_PARAMS
from neox.config.values import listed, nearest

# Names that existed once in GPT-NeoX or Megatron, or that forks added.
RENAMED = {
    "save_interval": "Use checkpoint_factor.",
    "attention_type": "Use num_kv_heads for grouped-query attention, attention_config for kinds.",
    "decay_lr_to": "Use min_lr: the rate itself, not a share of it.",
    "warmup_iters": "Use warmup: a share of lr_decay_iters, not a number of iterations.",
    "lr_warmup_iters": "Use warmup: a share of lr_decay_iters, not a number of iterations.",
    "lr_warmup_fraction": "Use warmup.",
    "learning_rate": "Use optimizer.params.lr.",
    "max_lr": "Use optimizer.params.lr.",
    "micro_batch_size": "Use train_micro_batch_size_per_gpu.",
    "global_batch_size": "Use train_batch_size.",
    "train_micro_batch_size": "Use train_micro_batch_size_per_gpu.",
    "tensor_model_parallel_size": "Use model_parallel_size.",
    "tensor_parallel_size": "Use model_parallel_size.",
    "pipeline_model_parallel_size": "Use pipe_parallel_size.",
    "pipeline_parallel_size": "Use pipe_parallel_size.",
    "encoder_seq_length": "Use seq_length.",
    "ffn_hidden_size": "Use intermediate_size.",
    "ff_mult": "Use expansion_factor.",
    "mlp_type": "Use activation; swiglu is LLaMA's.",
    "num_query_groups": "Use num_kv_heads.",
    "num_attention_heads_kv": "Use num_kv_heads.",
    "rotary_percent": "Use rotary_pct.",
    "rope_theta": "Use rotary_emb_base.",
    "rotary_base": "Use rotary_emb_base.",
    "layer_norm_eps": "Use layernorm_epsilon.",
    "layernorm_eps": "Use layernorm_epsilon.",
    "rms_norm_eps": "Use rms_norm_epsilon.",
    "untie_embeddings_and_output_weights": "Use no_weight_tying.",
    "sparsity": "Use attention_config.",
    "geglu": "Use activation: geglu.",
    "pos_emb_type": "Use pos_emb.",
    "checkpoint_activations_num_layers": "Use checkpoint_num_layers.",
    "seq_len": "Use seq_length.",
    "max_seq_len": "Use seq_length and max_position_embeddings.",
    "tokenizer": "Use tokenizer_type and vocab_file.",
    "vocab_size": "The tokenizer decides it; see make_vocab_size_divisible_by.",
    "fp32": "Use precision: fp32.",
    "bfloat16": "Use bf16: {enabled: true} or precision: bfloat16.",
    "wandb_name": "Use wandb_run_name.",
    "wandb_entity": "Use wandb_team.",
    "wandb_project_name": "Use wandb_project.",
    "hidden_dim": "Use hidden_size.",
    "num_gpu": "Use num_gpus.",
    "gas": "Use gradient_accumulation_steps.",
}


def explain_unknown(name: str, known: list[str], block: str, owner: type) -> str:
    """What to tell a user about a key that does not exist.

    `block` is the dotted path of the mapping it stands in ("" for the top level), `known` that
    mapping's keys, `owner` the class of the whole configuration.
    """
    path = f"{block}.{name}" if block else name
    sentence = f"{path} is not a key of {block}." if block else f"{path} is not a key."
    if not name:
        return "a key is empty."
    if not block and name in RENAMED:
        return f"{sentence} {RENAMED[name]}"
    homes = _homes(name, block, owner)
    if homes:
        return f"{sentence} It belongs {homes}."
    if block == "deepspeed_extra_args":
        known = [*known, *keys_of(owner)]
    near = nearest(name, known)
    if near:
        return f"{sentence} Did you mean {near}?"
    if block and name in RENAMED:
        return f"{sentence} {RENAMED[name]}"
    if block:
        return f"{sentence} It takes {listed(known, 'and')}."
    return f"{sentence} docs/configuration.md lists them all."


def _homes(name: str, block: str, owner: type) -> str:
    """Where a key of exactly this name exists: "at the top level", "in optimizer.params"."""
    if name in keys_of(owner):
        return "at the top level"
    paths = [p for p, keys in _blocks(owner, "") if p != block and name in keys_of(keys)]
    return f"in {listed(paths)}" if paths else ""


def _blocks(owner: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, spec in keys_of(owner).items():
        if name == "optimizer" and not prefix:
            yield "optimizer.params", OPTIMIZER_PARAMS["adam"]
        if spec.block is not None and spec.status == "acts" and name != "deepspeed_extra_args":
            yield prefix + name, spec.block
            yield from _blocks(spec.block, f"{prefix}{name}.")
