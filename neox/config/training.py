"""The training loop: how long, how often, what is saved, loaded and recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox.config.fields import derived, ignored, key, refused

_DPO = "train_impl: dpo is not supported"
_KTO = "train_impl: kto is not supported"
_RM = "train_impl: rm is not supported"
_REINFORCE = "train_impl: reinforce is not supported"
_MUP = "maximal update parametrisation is not supported"
_S3 = "uploading to S3 is not supported. Sync the save folder with a tool of your own"
_RANDOM = "there is none: random numbers follow from the seed and the iteration"
_UNREAD = "nothing reads it (nor upstream)"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything about the loop that is not data, optimizer or schedule."""

    train_iters: int | None = key(None, "Optimizer steps to take.", low=1)
    train_epochs: int | None = key(
        None, "Instead of train_iters: passes over the training data.", low=1
    )
    exit_interval: int | None = key(None, "Stop when the iteration is a multiple of it.", low=1)
    eval_interval: int = key(1000, "Iterations between two validations.", low=1)
    eval_iters: int = key(100, "Batches of one validation; 0: no losses, only eval_tasks.", low=0)
    char_level_ppl: bool = key(False, "Report validation's perplexity by character too.")
    train_impl: Literal["normal", "dpo", "rm", "kto", "reinforce"] = key(
        "normal",
        "The objective: next-token prediction.",
        refused=dict.fromkeys(
            ("dpo", "rm", "kto", "reinforce"),
            "preference and reinforcement learning are not supported",
        ),
    )

    save: str | None = key(None, "Folder to write checkpoints to; one run at a time.")
    load: str | None = key(
        None, "Checkpoint to start from: a folder of them, one of its steps, or of transformers."
    )
    checkpoint_factor: int | float | None = key(
        None, "Save every so many iterations; the ratio between saves on a log scale.", above=0
    )
    checkpoint_scale: Literal["linear", "log"] = key("linear", "Spacing of the saves.")
    extra_save_iters: list[int] | None = key(None, "More iterations to save at; 0 is the start.")
    keep_last_n_checkpoints: int | None = key(
        None, "Older checkpoints are deleted; all are kept by default.", low=1
    )
    finetune: bool = key(False, "Take only the weights from `load` and start at iteration 0.")
    no_load_optim: bool = key(False, "Don't load the optimizer's state.")
    no_load_rng: bool = ignored(False, "Don't load random states.", _RANDOM)
    no_save_rng: bool = ignored(False, "Don't save random states.", _RANDOM)
    no_save_optim: bool = ignored(
        False, "Don't save the optimizer's state.", "it is always saved (also upstream)"
    )
    checkpoint_validation_with_forward_pass: bool = key(
        False, "Save the losses of a forward pass; after loading, compute and compare them."
    )
    s3_path: str | None = refused(None, "S3 address to upload checkpoints to.", _S3)
    s3_chunk_size: int = refused(104857600, "Bytes of one part of an upload.", _S3)

    checkpoint_activations: bool = key(False, "Recompute activations in the backward pass.")
    checkpoint_num_layers: int = key(1, "Layers recomputed together.", low=1)
    partition_activations: bool = key(
        False, "Split what recomputation keeps between tensor-parallel processes."
    )
    checkpoint_in_cpu: bool = key(False, "Keep in CPU memory what recomputation keeps.")
    contiguous_checkpointing: bool = ignored(
        False, "Keep activations in one buffer.", "torch's allocator manages them"
    )
    synchronize_each_layer: bool = ignored(
        False, "Wait for the device after every recomputed layer.", "it only costs time"
    )
    profile_backward: bool = ignored(False, "Time the backward pass.", "it is not timed apart")
    deepspeed_activation_checkpointing: bool = ignored(
        True, "Recompute through DeepSpeed.", "torch's checkpointing does it"
    )

    clip_grad: float = ignored(
        1.0, "Largest gradient norm.", "gradient_clipping is the key that acts (also upstream)"
    )
    hysteresis: int = ignored(
        2,
        "Overflows before the loss scale is halved.",
        "fp16.hysteresis is the key that acts (also upstream)",
    )
    dynamic_loss_scale: bool | None = ignored(
        None,
        "Whether the loss scale is dynamic.",
        "fp16.loss_scale: 0 makes the scale dynamic (also upstream)",
    )
    loss_scale: float | None = ignored(
        None, "The loss scale.", "fp16.loss_scale is the key that acts (also upstream)"
    )
    loss_scale_window: float = ignored(
        1000.0,
        "Steps that double the loss scale.",
        "fp16.loss_scale_window is the key that acts (also upstream)",
    )
    min_scale: float = ignored(
        1.0, "Smallest loss scale.", "fp16.min_loss_scale is the key that acts (also upstream)"
    )
    batch_size: int | None = derived(
        None, "Batch of one process.", "train_micro_batch_size_per_gpu sets it"
    )

    dpo_fp32: bool = refused(True, "Log-probabilities in fp32.", _DPO)
    dpo_reference_free: bool = refused(False, "Without a reference model.", _DPO)
    dpo_beta: float = refused(0.1, "Strength of the preference.", _DPO)
    kto_fp32: bool = refused(True, "Log-probabilities in fp32.", _KTO)
    kto_desirable_weight: float = refused(1.0, "Weight of desirable texts.", _KTO)
    kto_undesirable_weight: float = refused(1.0, "Weight of undesirable texts.", _KTO)
    kto_beta: float = refused(0.1, "Strength of the preference.", _KTO)
    z_loss: float = refused(0.0, "Penalty on the reward's size.", _RM)
    fp32_reinforce: bool = refused(True, "Log-probabilities in fp32.", _REINFORCE)
    kl_impl: Literal["abs", "mse", "kl", "full"] = refused(
        "mse", "Estimator of the divergence.", _REINFORCE
    )
    kl_div_beta: float = refused(0.1, "Weight of the divergence.", _REINFORCE)
    reinforce_leave_one_out: bool = refused(False, "Leave-one-out baseline.", _REINFORCE)

    use_mup: bool = refused(False, "Maximal update parametrisation.", _MUP)
    coord_check: bool = refused(False, "Check activations over widths.", _MUP)
    save_base_shapes: bool = refused(False, "Write the base shapes.", _MUP)
    base_shapes_file: str | None = refused(None, "The base shapes.", _MUP)
    mup_init_scale: float = refused(1.0, "Scale of the initial weights.", _MUP)
    mup_embedding_mult: float = refused(1.0, "Scale of the embedding.", _MUP)
    mup_rp_embedding_mult: float = refused(1.0, "Scale of the position embedding.", _MUP)
    mup_width_scale: int = refused(2, "Width of the second base model.", _MUP)
    mup_attn_temp: float = ignored(1.0, "Temperature of attention.", _UNREAD)
    mup_output_temp: float = ignored(1.0, "Temperature of the output.", _UNREAD)
