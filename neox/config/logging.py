"""LoggingConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    use_wandb: bool | None = key(None, "")
    wandb_group: str | None = key(None, "")
    wandb_run_name: str | None = key(None, "")
    wandb_team: str | None = key(None, "")
    wandb_project: str = key("neox", "")
    wandb_host: str = key("https://api.wandb.ai", "")
    wandb_init_all_ranks: bool = key(False, "")
    git_hash: str | None = key(None, "")
    log_dir: str | None = key(None, "")
    tensorboard_dir: str | None = key(None, "")
    use_comet: bool | None = key(None, "")
    comet_workspace: str | None = key(None, "")
    comet_project: str | None = key(None, "")
    comet_experiment_name: str | None = key(None, "")
    comet_tags: list | None = key(None, "")
    comet_others: dict | None = key(None, "")
    comet_experiment: Any = key(None, "")
    peak_theoretical_tflops: float | None = key(None, "")
    log_interval: int = key(100, "")
    log_grad_pct_zeros: bool = key(False, "")
    log_param_norm: bool = key(False, "")
    log_grad_norm: bool = key(False, "")
    log_optimizer_states: bool = key(False, "")
    log_gradient_noise_scale: bool = key(False, "")
    gradient_noise_scale_n_batches: int = key(5, "")
    gradient_noise_scale_cpu_offload: bool = key(False, "")
    memory_profiling: bool = key(False, "")
    memory_profiling_path: str | None = key(None, "")
    profile: bool = key(False, "")
    profile_step_start: int = key(10, "")
    profile_step_stop: int = key(12, "")
