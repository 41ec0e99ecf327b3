"""What a run reports, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neox.config.fields import derived, ignored, key

COMET = "Comet is not supported. use_wandb and tensorboard_dir are"
NOISE = "the gradient noise scale is not measured (upstream fails on it)"


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Console, files, Weights & Biases, TensorBoard."""

    log_interval: int = key(100, "Iterations between two console lines.", low=1)
    log_dir: str | None = key(None, "Folder of metrics.jsonl and the other logs.")
    tensorboard_dir: str | None = key(None, "Folder for TensorBoard.")
    peak_theoretical_tflops: float | None = key(
        None, "Peak TFLOP/s of one device; with it, utilisation is logged.", above=0
    )
    log_param_norm: bool = key(False, "Log every parameter's norm, every iteration.")
    log_grad_norm: bool = key(
        False, "Log every gradient's norm; that of the whole gradient is always logged."
    )
    log_grad_pct_zeros: bool = key(False, "Log each gradient's share of zeros, in percent.")
    log_optimizer_states: bool = key(False, "Log norms of the optimizer's state.")
    log_gradient_noise_scale: bool = ignored(False, "Log the gradient noise scale.", NOISE)
    gradient_noise_scale_n_batches: int = ignored(5, "Batches to average it over.", NOISE)
    gradient_noise_scale_cpu_offload: bool = ignored(False, "Keep its buffers on the CPU.", NOISE)
    git_hash: str | None = derived(None, "Commit of the code.", "the running code's commit is used")

    use_wandb: bool | None = key(
        None, "Log to Weights & Biases (WANDB_MODE=offline needs no account)."
    )
    wandb_group: str | None = key(None, "Group of the run.")
    wandb_run_name: str | None = key(None, "Name of the run.")
    wandb_team: str | None = key(None, "Team (entity) of the run.")
    wandb_project: str = key("neox", "Project of the run.")
    wandb_host: str = key("https://api.wandb.ai", "Address of the server.")
    wandb_init_all_ranks: bool = ignored(
        False, "One run for every process.", "one run reports for all processes"
    )

    use_comet: bool | None = ignored(None, "Log to Comet.", COMET)
    comet_workspace: str | None = ignored(None, "Comet's workspace.", COMET)
    comet_project: str | None = ignored(None, "Comet's project.", COMET)
    comet_experiment_name: str | None = ignored(None, "Comet's experiment.", COMET)
    comet_tags: list[str] | None = ignored(None, "Comet's tags.", COMET)
    comet_others: dict[str, Any] | None = ignored(None, "Comet's other values.", COMET)
    comet_experiment: Any = derived(None, "Comet's running experiment.", COMET)

    profile: bool = key(
        False, "Profile some iterations; the trace goes to tensorboard_dir, or log_dir/profile."
    )
    profile_step_start: int = key(10, "First iteration to profile.", low=1)
    profile_step_stop: int = key(
        12, "Iteration to stop the profiler at, not profiled itself.", low=2
    )
    memory_profiling: bool = key(False, "Record CUDA's memory while profiling.")
    memory_profiling_path: str | None = key(
        None, "Folder of the memory snapshots; log_dir/profile by default."
    )
