"""MoEConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from neox.config.fields import REQUIRED, key


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    moe_num_experts: int = key(1, "")
    moe_expert_interval: int = key(1, "")
    moe_top_k: int = key(1, "")
    moe_router_type: Literal["sinkhorn", "topk"] = key("sinkhorn", "")
    moe_lbl_in_fp32: bool = key(False, "")
    moe_jitter_eps: float | None = key(None, "")
