"""The dictionary for DeepSpeed, and that our lists of its keys are its own."""

from __future__ import annotations

from typing import Any

import pytest

from neox.config import NeoXConfig, from_dict, to_deepspeed
from neox.config.blocks import (
    BF16,
    FP16,
    ActivationCheckpointing,
    CommsLogger,
    DataTypes,
    ExtraArgs,
    OffloadOptimizer,
    OffloadParam,
    ZeroOptimization,
)
from neox.config.fields import keys_of

MODEL = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
}


def build(**values: Any) -> NeoXConfig:
    stages = max(1, values.get("pipe_parallel_size", 1))
    return from_dict(MODEL | values, world_size=3 * stages)


def test_a_plain_run() -> None:
    assert to_deepspeed(build()) == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,  # written although it is DeepSpeed's default, today
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
    }


def test_clipping_is_written_when_it_is_off() -> None:
    assert to_deepspeed(build(gradient_clipping=0))["gradient_clipping"] == 0.0


def test_fp16_without_its_leftovers() -> None:
    fp16 = {"fp16": True, "enabled": True, "loss_scale": 0, "initial_scale_power": 12}
    result = to_deepspeed(build(fp16=fp16))
    assert result["fp16"] == {"enabled": True, "loss_scale": 0.0, "initial_scale_power": 12}
    assert "bf16" not in result
    assert "data_types" not in result


def test_fp16_by_precision_alone() -> None:
    assert to_deepspeed(build(precision="fp16"))["fp16"] == {"enabled": True}


@pytest.mark.parametrize(
    "values",
    [
        {"precision": "bfloat16"},
        {"bf16": {"enabled": True}},
        {"fp16": {"enabled": True, "type": "bfloat16", "auto_cast": True, "loss_scale": 0}},
        {"bf16": {"bf16": True, "enabled": True, "loss_scale": 0, "hysteresis": 2}},
    ],
)
def test_bf16_sums_gradients_in_fp32(values: dict[str, Any]) -> None:
    result = to_deepspeed(build(**values))
    assert result["bf16"] == {"enabled": True}
    assert result["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "fp16" not in result


def test_gradients_can_be_summed_in_bf16() -> None:
    result = to_deepspeed(build(precision="bfloat16", data_types={"grad_accum_dtype": "bf16"}))
    assert result["data_types"] == {"grad_accum_dtype": "bf16"}


def test_zero_passes_through_what_deepspeed_still_knows() -> None:
    zero = {
        "stage": 2,
        "reduce_bucket_size": 5e8,
        "cpu_offload": False,
        "elastic_checkpoint": False,
        "stage3_prefetch_bucket_size": 1000,
        "overlap_comm": None,
        "offload_optimizer": {"device": "CPU", "pin_memory": False},
    }
    result = to_deepspeed(build(zero_optimization=zero))["zero_optimization"]
    assert result == {
        "stage": 2,
        "reduce_bucket_size": 500000000,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert type(result["reduce_bucket_size"]) is int
    zero |= {"stage": 3, "offload_param": {"device": "cpu"}}
    result = to_deepspeed(build(zero_optimization=zero))["zero_optimization"]
    assert result["stage3_prefetch_bucket_size"] == 1000
    assert result["offload_param"] == {"device": "cpu"}


@pytest.mark.parametrize(("stages", "kept"), [(0, True), (1, False), (2, False)])
def test_a_pipeline_has_nothing_to_overlap_with(stages: int, kept: bool) -> None:
    zero = {"stage": 1, "overlap_comm": True}
    config = build(pipe_parallel_size=stages, zero_optimization=zero)
    assert ("overlap_comm" in to_deepspeed(config)["zero_optimization"]) is kept


def test_communication() -> None:
    assert to_deepspeed(build(fp32_allreduce=True))["communication_data_type"] == "fp32"
    config = build(communication_data_type="bf16", fp32_allreduce=True)
    assert to_deepspeed(config)["communication_data_type"] == "bf16"


def test_extra_arguments_are_merged() -> None:
    profiler = {"enabled": True, "output_file": None}
    extra = {"disable_allgather": True, "flops_profiler": profiler, "log_level": "info"}
    result = to_deepspeed(build(deepspeed_extra_args=extra))
    assert result["disable_allgather"] is True
    assert result["flops_profiler"] == {"enabled": True}
    assert "log_level" not in result


def test_nothing_that_would_build_an_optimizer_or_a_monitor() -> None:
    config = build(
        optimizer={"type": "Adam", "params": {"lr": 1e-3}},
        tensorboard={"enabled": True},
        use_wandb=True,
        steps_per_print=1,
    )
    result = to_deepspeed(config)
    assert not {"optimizer", "scheduler", "tensorboard", "wandb", "csv_monitor"} & set(result)
    assert result["steps_per_print"] == 1 << 30


def test_the_lists_of_keys_are_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key that is passed on exists there, under this name."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def acting(block: type) -> set[str]:
        return {name for name, spec in keys_of(block).items() if spec.status == "acts"}

    fields = DeepSpeedZeroConfig.model_fields
    assert acting(ZeroOptimization) <= {field.alias or name for name, field in fields.items()}
    assert acting(OffloadParam) <= set(DeepSpeedZeroOffloadParamConfig.model_fields)
    assert acting(FP16) - {"type"} <= set(DeepSpeedFP16Config.model_fields)
    assert acting(BF16) <= set(DeepSpeedBF16Config.model_fields)
    assert acting(OffloadOptimizer) <= set(DeepSpeedZeroOffloadOptimizerConfig.model_fields)
    assert set(keys_of(CommsLogger)) == set(CommsLoggerConfig.model_fields)
    assert set(keys_of(ActivationCheckpointing)) == set(ACT_CHKPT_DEFAULT)
    named = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(keys_of(DataTypes)) <= named
    assert set(keys_of(ExtraArgs)) <= named | {"aio", "memory_breakdown"}


@pytest.mark.parametrize("precision", ["fp32", "bfloat16", "fp16"])
def test_deepspeed_reads_it(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    config = build(
        precision=precision,
        zero_optimization={"stage": 1, "reduce_bucket_size": 5e8, "contiguous_gradients": True},
        flops_profiler={"enabled": False, "profile_step": 3},
        checkpoint={"tag_validation": "fail"},
        gradient_clipping=0.5,
    )
    parsed = DeepSpeedConfig(to_deepspeed(config) | {"train_batch_size": 8})
    assert parsed.zero_optimization_stage == 1
    assert parsed.zero_config.reduce_bucket_size == 500_000_000
    assert parsed.gradient_clipping == 0.5
    assert parsed.gradient_accumulation_steps == 2
    assert parsed.float16_config.enabled == (precision == "fp16")
    assert parsed.bfloat16_config.enabled == (precision == "bfloat16")
    assert parsed.checkpoint_tag_validation_fail
    assert parsed.optimizer_name is None


def scaler_of(fp16: dict[str, Any], patch: pytest.MonkeyPatch) -> Any:
    """The loss scaler that DeepSpeed makes for a GPU from our dictionary."""
    patch.setenv("DS_ACCELERATOR", "cpu")
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    patch.setattr("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 1)
    given = to_deepspeed(build(fp16={"enabled": True, **fp16}))
    block = DeepSpeedConfig(given | {"train_batch_size": 8}).float16_config
    return CreateLossScaler(
        torch.half,
        static_loss_scale=block.loss_scale,
        dynamic_scaling=block.loss_scale == 0,
        dynamic_loss_args=block.dynamic_loss_scale_args(),
    )


@pytest.mark.parametrize(
    ("fp16", "overflows", "scales"),
    [
        # The first of two overflows is forgiven, the second and later ones halve.
        ({"initial_scale_power": 4}, "xxx", [16, 8, 4]),
        ({"initial_scale_power": 4, "hysteresis": 1}, "xxx", [8, 4, 2]),
        ({"initial_scale_power": 4, "hysteresis": 3}, "xx.xx", [16, 16, 16, 8, 4]),
        # Only overflows in a row count.
        (
            {"initial_scale_power": 4, "hysteresis": 2, "consecutive_hysteresis": True},
            "x.x.xx",
            [16, 16, 16, 16, 16, 8],
        ),
        ({"initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 2}, "xx", [2, 2]),
        ({"initial_scale_power": 4, "loss_scale_window": 2.0}, ".....", [16, 16, 32, 32, 64]),
        ({"loss_scale": 128, "initial_scale_power": 4}, "x.x", [128, 128, 128]),
        ({}, ".", [65536]),
    ],
)
def test_the_loss_scale_moves_as_configured(
    fp16: dict[str, Any], overflows: str, scales: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = scaler_of(fp16, monkeypatch)
    scaler.raise_error_at_min_scale = False
    found = []
    for step in overflows:
        scaler.update_scale(step == "x")
        found.append(scaler.loss_scale)
    assert found == scales
