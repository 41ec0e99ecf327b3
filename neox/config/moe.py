"""Mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from neox.config.fields import ignored, refused

_MOE = "mixture-of-experts layers are not supported"


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Known, and refused: every model is dense."""

    moe_num_experts: int = refused(1, "Experts of a layer.", _MOE)
    moe_expert_interval: int = refused(1, "Layers from one with experts to the next.", _MOE)
    moe_top_k: int = refused(1, "Experts that a token goes to.", _MOE)
    moe_router_type: Literal["sinkhorn", "topk"] = refused("sinkhorn", "The router.", _MOE)
    moe_jitter_eps: float | None = refused(None, "Noise of the router.", _MOE)
    moe_lbl_in_fp32: bool = ignored(False, "Balancing loss in fp32.", "nothing reads it")
