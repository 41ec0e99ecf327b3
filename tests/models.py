"""Small models for tests: architectures worth sweeping, and weights that leave nothing at zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neox.checkpoint.directory import write_checkpoint
from neox.checkpoint.neox import save_layers
from neox.config import NeoXConfig, from_dict
from neox.config.architecture import architecture
from neox.model.frozen import Frozen, Storage
from neox.model.gpt import Layer, LocalLayers, build_layers, layers
from neox.model.init import initialize
from neox.model.packed import Packed, pack
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups
from neox.parallel.region import TensorParallelRegion

VOCAB = 64

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "precision": "fp32",
    "train_iters": 4,
    "lr_decay_iters": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8}},
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
    "distributed_backend": "gloo",
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "neox": {},
    "sequential": {"gpt_j_residual": False},
    "one_norm": {"gpt_j_tied": True},
    "sequential_ignores_tied_norm": {"gpt_j_residual": False, "gpt_j_tied": True},
    "tied": {"no_weight_tying": False},
    "learned": {"pos_emb": "learned"},
    "no_positions": {"pos_emb": "none"},
    "tanh_gelu": {"bias_gelu_fusion": True},
    "no_bias": {"use_bias_in_attn_linear": False, "use_bias_in_mlp": False},
    "sequential_no_bias": {
        "gpt_j_residual": False,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
    "mlp_bias_only": {"use_bias_in_attn_linear": False},
    "full_rotary": {"rotary_pct": 1.0, "rotary_emb_base": 500},
    "grouped_queries": {"num_kv_heads": 2},
    "window": {"sliding_window_width": 4},
    "llama": {
        "gpt_j_residual": False,
        "norm": "rmsnorm",
        "rms_norm_epsilon": 1e-5,
        "activation": "swiglu",
        "intermediate_size": 96,
        "num_kv_heads": 2,
        "rotary_pct": 1.0,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
    "geglu": {"activation": "geglu", "intermediate_size": 96},
    "gpt_j": {
        "gpt_j_tied": True,
        "rotary_interleaved": True,
        "use_bias_in_attn_linear": False,
        "use_bias_in_final_linear": True,
        "bias_gelu_fusion": True,
    },
    "grouped_interleaved": {"num_kv_heads": 2, "rotary_interleaved": True},
    "relu": {"activation": "relu"},
    "mish": {"activation": "mish"},
    "softsign": {"activation": "softsign"},
}


def config_of(world_size: int = 1, **values: Any) -> NeoXConfig:
    """BASE with `values` over it, checked as any configuration is."""
    return from_dict({**BASE, **values}, world_size=world_size)


def model_layers(
    config: NeoXConfig, groups: ProcessGroups, storage: Storage = "dense"
) -> list[Layer]:
    region = TensorParallelRegion(groups, sequence_parallel=config.sequence_parallel)
    frozen = None if storage == "dense" else Frozen(torch.float32, groups, storage)
    return layers(config, VOCAB, torch.float32, groups, region=region, frozen=frozen)


def random_weights(config: NeoXConfig, seed: int = 0) -> dict[str, Tensor]:
    """Whole tensors by "layer.name"; norms near one, everything else off zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in model_layers(config, ProcessGroups.single()):
        if not layer.has_file:
            continue
        assert layer.layout is not None
        for name, layout in layer.layout.items():
            tensor = torch.randn(layout.shape, generator=generator) * 0.1
            is_scale = "norm" in name and not name.endswith("bias")
            weights[f"{layer.index}.{name}"] = tensor + 1.0 if is_scale else tensor
    return weights


def fill(
    module: nn.Module, layer: Layer, weights: dict[str, Tensor], groups: ProcessGroups
) -> None:
    """Set a built layer's weights to this rank's shards of `weights`."""
    assert layer.layout is not None

    def mine(name: str) -> Tensor:
        whole = weights[f"{layer.file_index}.{name}"]
        return shard(whole, layer.layout[name], groups.tp_rank, groups.tp)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(mine(name))
        for name, part in module.named_modules():
            if isinstance(part, Packed):
                part.assign(pack(mine(name), part.bits))


def built(
    config: NeoXConfig,
    weights: dict[str, Tensor],
    groups: ProcessGroups,
    storage: Storage = "dense",
) -> LocalLayers:
    """Every layer of the model on this rank, filled, in order; tied layers share a module."""
    return build_layers(
        model_layers(config, groups, storage),
        lambda module, layer: fill(module, layer, weights, groups),
    )


def write_model(directory: Path, iteration: int, seed: int = 0, **values: Any) -> Path:
    """A checkpoint, in `directory`, of BASE with `values` over it; weights of `random_weights`."""
    config = config_of(**values)
    stage = built(config, random_weights(config, seed), ProcessGroups.single())
    return write_checkpoint(
        directory,
        iteration,
        lambda folder: save_layers(folder, stage, ProcessGroups.single()),
        {"small.yml": "{}"},
        ProcessGroups.single(),
        grid={"tp": 1, "pp": 1, "dp": 1},
        padded_vocab_size=VOCAB,
        architecture=architecture(config),
    )


def write_new_model(directory: Path, vocabulary: int, **values: Any) -> None:
    """global_step1 in `directory`: a model's layers as they begin, and nothing beside them."""
    config, single = config_of(**values), ProcessGroups.single()
    step = directory / "global_step1"
    step.mkdir()
    for layer in layers(config, vocabulary, torch.float32, single):
        if layer.has_file:
            module = layer.build()
            initialize(module, layer, config, 1, single)
            name = f"layer_{layer.index:02d}-model_00-model_states.pt"
            torch.save(module.state_dict(), step / name)
    (directory / "latest").write_text(step.name)


def forward(stage: LocalLayers, tokens_BS: Tensor) -> Tensor:
    x = tokens_BS
    for layer, module in stage:
        x = layer(module, x)
    return x


def tokens(batch: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
