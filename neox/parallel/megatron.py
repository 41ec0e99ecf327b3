"""The door to megatron-core: its tensor-parallel layers, as our model calls them.

Imported only when tp > 1: the import alone costs seconds and hundreds of megabytes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state, tensor_parallel
from torch import Tensor

from neox.parallel.topology import Topology


def initialize(topology: Topology) -> dist.ProcessGroup:
    """Set up megatron-core's parallel state and return this rank's tp group. Collective."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        order="tp-cp-ep-dp-pp",
    )
    return parallel_state.get_tensor_model_parallel_group()


def shutdown() -> None:
    parallel_state.destroy_model_parallel()


def _config(dtype: torch.dtype) -> ModelParallelConfig:
    # Weights are allocated on the CPU and left uninitialised: ours are initialised by
    # neox.model.init, in the same way at every tp, or read from a checkpoint.
    return ModelParallelConfig(
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
    )


def _no_init(weight: Tensor) -> None:
    raise AssertionError("megatron-core was told not to initialise")


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """y_local = x W_local^T + b_local: x whole on every rank, the output features split."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """The input features split. neox.model.block multiplies by its weight and adds up the ranks."""


class VocabParallelEmbedding(tensor_parallel.VocabParallelEmbedding):
    """Rows of the table split over the ranks."""

    def forward(self, tokens: Tensor, *, reduce: bool = True) -> Tensor:
        """[...] -> [..., H]; without `reduce`, this rank's summand: zeros for others' tokens."""
        if reduce:
            return super().forward(tokens)
        rows = tokens - self.vocab_start_index
        elsewhere = (rows < 0) | (rows >= self.num_embeddings_per_partition)
        found = F.embedding(rows.masked_fill(elsewhere, 0), self.weight)
        return found.masked_fill(elsewhere[..., None], 0.0)


def column_parallel_linear(
    in_size: int,
    out_size: int,
    bias: bool,
    dtype: torch.dtype,
    group: dist.ProcessGroup,
) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        in_size,
        out_size,
        config=_config(dtype),
        init_method=_no_init,
        bias=bias,
        disable_grad_reduce=True,
        tp_group=group,
    )


def row_parallel_linear(
    in_size: int, out_size: int, bias: bool, dtype: torch.dtype, group: dist.ProcessGroup
) -> RowParallelLinear:
    return RowParallelLinear(
        in_size,
        out_size,
        config=_config(dtype),
        init_method=_no_init,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=group,
    )


def vocab_parallel_embedding(
    vocab_size: int, hidden_size: int, dtype: torch.dtype, group: dist.ProcessGroup
) -> VocabParallelEmbedding:
    return VocabParallelEmbedding(
        vocab_size, hidden_size, config=_config(dtype), init_method=_no_init, tp_group=group
    )
