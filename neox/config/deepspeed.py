"""DeepSpeed's part: the keys it knows, and the dictionary the engine is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neox.config.blocks import (
    BF16,
    FP16,
    ActivationCheckpointing,
    Checkpoint,
    CommsLogger,
    DataTypes,
    DType,
    ExtraArgs,
    FlopsProfiler,
    ZeroOptimization,
)
from neox.config.fields import derived, ignored, key, keys_of, refused

if TYPE_CHECKING:
    from neox.config.config import NeoXConfig

_MONITOR = "DeepSpeed's monitors are off, and {} is the key that acts"
_LOG = "DeepSpeed's own lines are off"
_NEVER = 1 << 30  # steps_per_print: DeepSpeed never prints; the training loop does


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """Keys that carry DeepSpeed's own names."""

    # Resolved by the loader: any sufficient subset of the three gives the rest.
    train_batch_size: int = key(None, "Samples of one optimizer step, over all replicas.", low=1)
    train_micro_batch_size_per_gpu: int = key(
        None, "Samples of one forward pass on one replica.", low=1
    )
    gradient_accumulation_steps: int = key(1, "Forward passes of one optimizer step.", low=1)

    zero_optimization: dict[str, Any] | None = key(
        None, "Sharding of the optimizer over replicas.", block=ZeroOptimization
    )
    fp16: dict[str, Any] | None = key(None, "Training in fp16, CUDA only.", block=FP16)
    bf16: dict[str, Any] | None = key(None, "Training in bfloat16.", block=BF16)
    data_types: dict[str, Any] | None = key(
        None, "Types of sums and casts in 16-bit training.", block=DataTypes
    )
    communication_data_type: DType | None = key(
        None, "Type gradients are exchanged in; the training type by default."
    )
    fp32_allreduce: bool = key(False, "The same as communication_data_type: fp32.")
    prescale_gradients: bool = key(False, "Divide gradients before summing them.")
    gradient_predivide_factor: float = key(
        1.0, "With prescale_gradients: part of the division done before.", above=0
    )
    flops_profiler: dict[str, Any] | None = key(
        None, "DeepSpeed's profiler of floating-point operations.", block=FlopsProfiler
    )
    checkpoint: dict[str, Any] | None = key(
        None, "How DeepSpeed writes checkpoints.", block=Checkpoint
    )
    deepspeed_extra_args: dict[str, Any] | None = key(
        None, "More keys for DeepSpeed, merged with the others.", block=ExtraArgs
    )

    deepspeed: bool = derived(True, "Train with DeepSpeed.", "training always runs on DeepSpeed")
    steps_per_print: int = ignored(
        10,
        "Steps between DeepSpeed's lines.",
        f"{_LOG}, and log_interval is the key that acts",
    )
    wall_clock_breakdown: bool = key(
        False, "Time the parts of every step, and log their means every log_interval."
    )
    dump_state: bool = ignored(False, "Print DeepSpeed's configuration.", _LOG)
    comms_logger: dict[str, Any] | None = ignored(
        None, "DeepSpeed's log of communication.", _LOG, block=CommsLogger
    )
    sparse_gradients: bool = ignored(False, "Sparse gradients.", "every gradient is dense")
    activation_checkpointing: dict[str, Any] | None = ignored(
        None,
        "DeepSpeed's recomputation.",
        "torch recomputes; checkpoint_activations and checkpoint_num_layers are the keys that act",
        block=ActivationCheckpointing,
    )
    tensorboard: dict[str, Any] | None = ignored(
        None, "DeepSpeed's TensorBoard monitor.", _MONITOR.format("tensorboard_dir")
    )
    wandb: dict[str, Any] | None = ignored(
        None, "DeepSpeed's Weights & Biases monitor.", _MONITOR.format("use_wandb")
    )
    csv_monitor: dict[str, Any] | None = ignored(
        None, "DeepSpeed's CSV monitor.", _MONITOR.format("log_dir")
    )
    scheduler: dict[str, Any] | None = refused(
        None,
        "DeepSpeed's learning-rate schedule.",
        "the schedule is set by lr_decay_style, lr_decay_iters, warmup and min_lr",
    )
    amp: dict[str, Any] | None = refused(
        None, "Apex's mixed precision.", "apex is not used. Use the fp16 or bf16 block"
    )
    curriculum_learning: dict[str, Any] | None = refused(
        None, "Growing sequence lengths.", "curriculum learning is not supported"
    )
    curriculum_seqlen: int = derived(
        0, "Sequence length of the curriculum.", "curriculum learning is not supported"
    )
    data_efficiency: dict[str, Any] | None = refused(
        None, "DeepSpeed's data sampling.", "data_path and split choose the data"
    )
    sparse_attention: dict[str, Any] | None = refused(
        None, "DeepSpeed's sparse attention.", "sparse attention is not supported"
    )
    autotuning: dict[str, Any] | None = refused(
        None, "DeepSpeed's autotuner.", "DeepSpeed's autotuner is not supported"
    )
    elasticity: dict[str, Any] | None = refused(
        None, "DeepSpeed's elastic batch sizes.", "the batch size never changes by itself"
    )
    compression_training: dict[str, Any] | None = refused(
        None, "Pruning and quantisation.", "compressed training is not supported"
    )


def to_deepspeed(config: NeoXConfig) -> dict[str, Any]:
    """The dictionary `deepspeed.initialize(config=...)` takes.

    It holds what acts and nothing else: no optimizer and no scheduler (the engine is given torch's
    and the rate is set before every step), no monitors. Clipping is always written, because
    DeepSpeed's default changed between versions. In 16 bit, ZeRO 0 becomes 1, the same arithmetic
    in less memory: at stage 0 DeepSpeed takes an empty first step.
    """
    result: dict[str, Any] = {
        "train_batch_size": config.train_batch_size,
        "train_micro_batch_size_per_gpu": config.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.gradient_clipping,
        "steps_per_print": _NEVER,
        "prescale_gradients": config.prescale_gradients,
        "gradient_predivide_factor": config.gradient_predivide_factor,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offloaded state is stepped by any optimizer
    }
    zero = _acting(config.zero_optimization, ZeroOptimization)
    result["zero_optimization"] = zero | {"stage": config.engine_zero_stage}
    if config.zero_stage < 3:
        of_stage_3 = {name for name in zero if name.startswith("stage3_")} | {"offload_param"}
        for name in of_stage_3 & zero.keys():
            del result["zero_optimization"][name]
    if config.pipe_parallel_size > 0:
        # The pipeline engine reduces once, after the last micro-batch: there is nothing to overlap
        # with, and DeepSpeed warns of the attempt.
        result["zero_optimization"].pop("overlap_comm", None)
    if config.sequence_parallel:
        # What travels between stages is a shard already; otherwise DeepSpeed takes it for the same
        # on every tensor-parallel rank, and sends and gathers a part of it from each.
        result["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    result |= _precision(config)
    if config.fp32_allreduce or config.communication_data_type is not None:
        result["communication_data_type"] = config.communication_data_type or "fp32"
    for name, block in (("flops_profiler", FlopsProfiler), ("checkpoint", Checkpoint)):
        if getattr(config, name) is not None:
            result[name] = _acting(getattr(config, name), block)
    return result | _acting(config.deepspeed_extra_args, ExtraArgs)


def _precision(config: NeoXConfig) -> dict[str, Any]:
    """The fp16 or bf16 block, and the type gradients are summed in."""
    data_types = _acting(config.data_types, DataTypes)
    if config.dtype == "float32":
        return {"data_types": data_types} if data_types else {}
    if config.dtype == "bfloat16":
        # Sums of many small bfloat16 gradients lose their last bits; fp32 keeps them.
        data_types = {"grad_accum_dtype": "fp32"} | data_types
        block = {"bf16": _acting(config.bf16, BF16) | {"enabled": True}}
    else:
        fp16 = _acting(config.fp16, FP16) | {"enabled": True}
        fp16.pop("type", None)
        block = {"fp16": fp16}
    return block | ({"data_types": data_types} if data_types else {})


def _acting(given: Mapping[str, Any] | None, block: type) -> dict[str, Any]:
    """The given keys that act, whole numbers as integers and without those left at null."""
    keys = keys_of(block)
    result = {}
    for name, value in (given or {}).items():
        spec = keys.get(name)
        if spec is None or spec.status != "acts" or value is None:
            continue
        if isinstance(value, dict) and spec.block is not None:
            value = _acting(value, spec.block)
        whole = isinstance(value, float) and value.is_integer() and spec.type is not float
        result[name] = int(value) if whole else value
    return result
