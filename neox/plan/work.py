"""What a run does in one step, as numbers: neox.plan.messages finds them, and time uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from neox.parallel.topology import Topology

Operation = Literal["all_reduce", "reduce_scatter", "all_gather", "reduce", "broadcast", "send"]
# Between whom: the ranks of a tp, dp or pp group, or a replica's tp x pp ranks.
Group = Literal["tp", "dp", "pp", "replica"]


@dataclass(frozen=True)
class Message:
    """All calls of one collective with tensors of one size, of one rank in one step.

    `bytes` are those of the whole tensor of all these calls together: what a gather makes, what a
    scatter takes. Of a send, the sender's side counts; what is received is the neighbour's send.
    """

    operation: Operation
    axis: Group
    count: int  # calls in a step, those of every micro-batch added up
    bytes: int  # of all calls together
    overlaps: bool = False  # whether backward goes on meanwhile


@dataclass(frozen=True)
class StageWork:
    """What a rank of one pipeline stage computes in one micro-batch, and sends in one step.

    Floating-point operations of matrix products on this rank, two for each multiply-add.
    """

    layers: int  # transformer layers
    forward_flops: float
    backward_flops: float  # without recomputation; 2 x forward where all weights are trained
    recompute_flops: float  # of activation checkpointing
    optimizer_bytes: int  # read and written by the optimizer's step
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Work:
    """One step of training on a grid."""

    topology: Topology
    micro_batches: int  # of a replica in one step: gradient_accumulation_steps
    tokens: int  # of the whole step, over all replicas
    dtype: str  # of the products: "float32", "bfloat16", "float16"
    pipelined: bool  # whether DeepSpeed's 1F1B schedule runs, even with one stage
    stages: tuple[StageWork, ...]  # by pipeline stage

    @property
    def flops(self) -> Mapping[str, float]:
        """Of all ranks and micro-batches together, by kind; the model's, without recomputation."""
        ranks = self.topology.tp * self.topology.dp * self.micro_batches
        kinds = ("forward_flops", "backward_flops", "recompute_flops")
        return {k: ranks * sum(getattr(stage, k) for stage in self.stages) for k in kinds}
