"""The nested blocks: which keys each may hold.

DeepSpeed drops a key it does not know without a word, so a typing error would train with a default.
These lists are DeepSpeed 0.19's own, checked against it by a test; what is in none of them is an
error here.
"""

from __future__ import annotations

from typing import Any, Literal

from neox.config.fields import ignored, key, refused

DType = Literal["fp32", "fp16", "bf16"]
_OFFLOAD = "Use offload_optimizer: {{device: cpu}}{}"
_OFFLOAD_PARAM = "Use offload_param: {device: cpu}"


class Optimizer:
    """optimizer"""

    type: str = key(
        "Adam", "Adam or AdamW (the same), SGD, Lion, cpu_adam, cpu_torch_adam or madgrad_wd."
    )
    params: dict[str, Any] = key(None, "Its parameters; lr is the peak learning rate.")
    legacy_fusion: bool = ignored(
        False, "Fused state of old optimizers.", "DeepSpeed does not build the optimizer"
    )


class FP16:
    """fp16"""

    enabled: bool = key(False, "Weights in fp16, master copy in fp32.")
    fp16: bool = ignored(True, "An old spelling of enabled.", "enabled is the key that acts")
    type: Literal["fp16", "bfloat16"] = key("fp16", "bfloat16 turns the block into bf16.")
    auto_cast: bool = key(False, "Cast inputs to fp16.")
    loss_scale: float = key(0.0, "Loss scale; 0 is dynamic.", low=0)
    initial_scale_power: int = key(16, "The dynamic scale starts at 2 to this power.", low=0)
    loss_scale_window: int | float = key(1000, "Steps without overflow that double it.", low=1)
    hysteresis: int = key(2, "Overflows before it is halved.", low=1)
    consecutive_hysteresis: bool = key(False, "Only overflows in a row count.")
    min_loss_scale: int | float = key(1, "It never falls below this.", low=1)
    fp16_master_weights_and_grads: bool = refused(
        False, "Master copy in fp16.", "it needs DeepSpeed's CPU Adam"
    )


class BF16:
    """bf16"""

    enabled: bool = key(False, "Weights in bfloat16, master copy in fp32.")
    bf16: bool = ignored(True, "An old spelling of enabled.", "enabled is the key that acts")
    immediate_grad_update: bool = key(False, "Add to the fp32 gradients during backward.")
    check_grad_overflow: bool = key(True, "Skip steps whose gradient is not finite.")
    bf16_master_weights_and_grads: bool = key(False, "Master copy in bfloat16.")
    bf16_optimizer_states: bool = key(False, "Optimizer state in bfloat16.")
    # Left over when a block of fp16 is renamed; bfloat16 needs no loss scale.
    loss_scale: float = ignored(0.0, "Loss scale.", "bfloat16 needs no loss scale")
    initial_scale_power: int = ignored(
        16, "Start of the loss scale.", "bfloat16 needs no loss scale"
    )
    loss_scale_window: int | float = ignored(
        1000, "Steps that double it.", "bfloat16 needs no loss scale"
    )
    hysteresis: int = ignored(2, "Overflows that halve it.", "bfloat16 needs no loss scale")
    min_loss_scale: int | float = ignored(1, "Smallest loss scale.", "bfloat16 needs no loss scale")


class DataTypes:
    """data_types"""

    grad_accum_dtype: DType = key(None, "Type gradients are summed in; fp32 by default.")
    param_dtype: DType = key(None, "Type DeepSpeed casts weights to.")
    buffer_dtype: DType = key(None, "Type DeepSpeed casts buffers to.")
    keep_in_fp32_modules: str | list[str] = key("auto", "Buffers that stay in fp32.")


class OffloadOptimizer:
    """zero_optimization.offload_optimizer"""

    device: Literal["none", "cpu", "nvme"] = key("none", "Where the optimizer's state lives.")
    nvme_path: str = key(None, "Folder on the NVMe device.")
    buffer_count: int = key(4, "Buffers.", low=0)
    pin_memory: bool = key(True, "Pin the memory.")
    pipeline_read: bool = key(False, "Read ahead.")
    pipeline_write: bool = key(False, "Write behind.")
    fast_init: bool = key(False, "Fast start with NVMe.")
    ratio: float = key(1.0, "Share of parameters updated on the CPU.", low=0, high=1)
    super_offload: bool = key(False, "SuperOffload.")
    cpuadam_cores_perc: float = key(0.8, "Share of cores for it.", low=0, high=1)


class OffloadParam:
    """zero_optimization.offload_param"""

    device: Literal["none", "cpu", "nvme"] = key("none", "Where the weights live (stage 3).")
    nvme_path: str = key(None, "Folder on the NVMe device.")
    buffer_count: int = key(5, "Buffers.", low=0)
    buffer_size: int | float = key(100000000, "Elements of a buffer.", low=0)
    max_in_cpu: int | float = key(1000000000, "With nvme: elements kept in CPU memory.", low=0)
    pin_memory: bool = key(True, "Pin the memory.")


class ZeroOptimization:
    """zero_optimization"""

    stage: Literal[0, 1, 2, 3] = key(
        0,
        "What is sharded over replicas: optimizer state (1), gradients too (2), weights too (3). "
        "2 and 3 need pipe_parallel_size: 0.",
    )
    allgather_partitions: bool = key(True, "All-gather instead of broadcasts.")
    allgather_bucket_size: int | float = key(500000000, "Elements gathered at once.", low=1)
    overlap_comm: bool = key(None, "Reduce gradients during the backward pass.")
    reduce_scatter: bool = key(True, "Reduce-scatter instead of all-reduce.")
    reduce_bucket_size: int | float = key(500000000, "Elements reduced at once.", low=1)
    contiguous_gradients: bool = key(True, "Copy gradients into one buffer.")
    use_multi_rank_bucket_allreduce: bool = key(True, "Combine small buckets.")
    compute_grad_norm: bool = key(True, "Compute the gradient's norm.")
    round_robin_gradients: bool = key(False, "Spread gradient copies over ranks.")
    parameter_alignment: bool = key(False, "Align parameters in flat buffers.")
    offload_optimizer: dict[str, Any] = key(
        None, "Keep the optimizer's state elsewhere.", block=OffloadOptimizer
    )
    load_from_fp32_weights: bool = key(True, "Restore fp32 weights from fp32 copies.")
    elastic_checkpoint: bool = ignored(
        False, "DeepSpeed's former resizing.", "the checkpoints here load at any size"
    )
    ignore_unused_parameters: bool = key(True, "Accept parameters without a gradient.")
    sub_group_size: int | float = key(1000000000, "Elements updated at once.", low=1)
    legacy_stage1: bool = ignored(
        False, "The first form of stage 1.", "DeepSpeed removed the old stage 1"
    )
    cpu_offload: bool = refused(
        False, "Former name of offload_optimizer.", f"DeepSpeed renamed it. {_OFFLOAD.format('')}"
    )
    cpu_offload_use_pin_memory: bool = refused(
        False,
        "Former name of offload_optimizer.pin_memory.",
        f"DeepSpeed renamed it. {_OFFLOAD.format(' with pin_memory')}",
    )
    cpu_offload_params: bool = refused(
        False, "Former name of offload_param.", f"DeepSpeed renamed it. {_OFFLOAD_PARAM}"
    )
    cpu_offload_param: bool = refused(
        False, "Former name of offload_param.", f"DeepSpeed renamed it. {_OFFLOAD_PARAM}"
    )
    # Stage 3 only. Configurations carry them; at stages 0 to 2 DeepSpeed does not look.
    offload_param: dict[str, Any] = key(
        None, "Stage 3: keep weights elsewhere.", block=OffloadParam
    )
    stage3_prefetch_bucket_size: int | float = key(
        50000000, "Stage 3: elements fetched ahead.", low=0
    )
    stage3_param_persistence_threshold: int | float = key(
        100000, "Stage 3: weights up to this size stay whole.", low=0
    )
    stage3_model_persistence_threshold: int | float = key(
        None, "Stage 3: most elements that stay whole.", low=0
    )
    stage3_max_live_parameters: int | float = key(
        1000000000, "Stage 3: most elements gathered.", low=0
    )
    stage3_max_reuse_distance: int | float = key(
        1000000000, "Stage 3: weights read again within so many elements stay gathered.", low=0
    )
    stage3_gather_16bit_weights_on_model_save: bool = ignored(
        False, "Save whole weights.", "layer files always hold whole weights"
    )
    stage3_gather_fp16_weights_on_model_save: bool = ignored(
        False, "Save whole weights.", "layer files always hold whole weights"
    )


class ActivationCheckpointing:
    """activation_checkpointing"""

    partition_activations: bool = key(False, "Split kept activations.")
    number_checkpoints: int = key(None, "Checkpoints of a forward pass.")
    contiguous_memory_optimization: bool = key(False, "Keep activations in one buffer.")
    synchronize_checkpoint_boundary: bool = key(False, "Wait for the device at each.")
    profile: bool = key(False, "Time the recomputation.")
    cpu_checkpointing: bool = key(False, "Keep activations in CPU memory.")


class CommsLogger:
    """comms_logger"""

    enabled: bool = key(False, "Log every communication.")
    verbose: bool = key(False, "Print each as it happens.")
    prof_all: bool = key(True, "All operations ...")
    prof_ops: list[str] = key(None, "... or these.")
    debug: bool = key(False, "Name the calling function.")


class FlopsProfiler:
    """flops_profiler"""

    enabled: bool = key(False, "Profile one step's floating-point operations.")
    recompute_fwd_factor: float = key(0.0, "Share of the forward pass computed again.", low=0)
    profile_step: int = key(1, "The step.", low=1)
    module_depth: int = key(-1, "Depth of modules shown; -1 is all.")
    top_modules: int = key(1, "Modules shown at each depth.", low=1)
    detailed: bool = key(True, "Show the whole model.")
    output_file: str = key(None, "Where to; standard output by default.")


class Checkpoint:
    """checkpoint"""

    tag_validation: Literal["Ignore", "Warn", "Fail"] = key(
        "Warn", "What to do when ranks save under different names."
    )
    load_universal: bool = refused(
        False, "The checkpoint is a universal one.", "universal checkpoints are not loaded"
    )
    use_node_local_storage: bool = refused(
        False, "Every machine saves on its own disk.", "all processes save into one folder"
    )
    parallel_write: dict[str, Any] = key(None, "Write by several processes of a replica.")


class ExtraArgs:
    """deepspeed_extra_args: DeepSpeed's top-level keys that are not keys of NeoX."""

    aio: dict[str, Any] = key(None, "Asynchronous I/O for NVMe offloading.")
    dataloader_drop_last: bool = ignored(
        False, "Drop an incomplete last batch.", "DeepSpeed does not load the data"
    )
    disable_allgather: bool = key(False, "Broadcast instead of all-gather.")
    disable_python_gc: bool = key(False, "Collect garbage at fixed places only.")
    gradient_allreduce_op: Literal["mean", "sum"] = refused(
        "mean",
        "How gradients of replicas are combined.",
        "the learning rate means the average gradient",
    )
    log_level: str = ignored(None, "Detail of DeepSpeed's log.", "DeepSpeed's own lines are off")
    memory_breakdown: bool = ignored(False, "Print memory use.", "DeepSpeed's own lines are off")
    seq_parallel_communication_data_type: DType = key("fp32", "Type of sequence-parallel sums.")
    zero_allow_untested_optimizer: bool = key(True, "Let ZeRO use an optimizer it does not know.")
    zero_force_ds_cpu_optimizer: bool = key(False, "Insist on DeepSpeed's CPU optimizer.")
