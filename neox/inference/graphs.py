"""A decoding pass on CUDA as one graph: torch.compile, and CUDA graphs of what it makes.

A graph is of fixed shapes and addresses, so a pass is always one of all the cache's rows. Rows that
are left out are computed as well, and write to a position of the memory that nothing reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from neox.model.block import TransformerLayer
from neox.model.cached_attention import LayerCache, StaticSpan
from neox.model.gpt import Embedding, LocalLayers
from neox.model.projection import adapter_of
from neox.parallel.groups import ProcessGroups

_CUDA_GRAPHS = {"mode": "reduce-overhead"}
_SHORTEST = 256  # positions that attention reads at least; then twice as many, and so on
_GRAPHS = 64  # of all shapes together, in a process; beyond them torch raises an error


def can_record(groups: ProcessGroups, stage: LocalLayers) -> bool:
    """Whether the whole model is here, on CUDA, as dense weights without adapters."""
    if groups.device.type != "cuda" or groups.tp > 1 or groups.pp > 1:
        return False
    built = [module for _, module in stage if isinstance(module, nn.Module)]
    owners = [part for module in built for part in module.modules() if hasattr(part, "weight")]
    return all(isinstance(o.weight, Tensor) and adapter_of(o) is None for o in owners)


class GraphPass:
    """A model for one new position each of some rows of a cache.

    It is compiled at its first call, and again whenever attention has to read twice as far. Another
    pass of the same model and shapes is not compiled again.
    """

    def __init__(
        self,
        stage: LocalLayers,
        keys: Tensor,
        values: Tensor,
        how: Mapping[str, str] = _CUDA_GRAPHS,
    ) -> None:
        """keys and values are the cache's, [layers, R, kv heads, T + 1, D]; the last of the T + 1
        positions is for rows that are left out. how: arguments of torch.compile."""
        self._stage, self._keys, self._values = stage, keys, values
        self._rows, self._spare = keys.shape[1], keys.shape[3] - 1
        torch._dynamo.config.recompile_limit = _GRAPHS
        for memory in (keys, values):
            # Else no CUDA graph is made of what writes to it.
            torch._dynamo.mark_static_address(memory, guard=False)
        for _, module in stage:
            if isinstance(module, TransformerLayer) and module.attention.rotary is not None:
                start = torch.zeros(1, 1, dtype=torch.int64, device=keys.device)
                module.attention.rotary.angles_at(start, self._spare + 1, keys)  # the whole table
        self._compute = torch.compile(self._step, fullgraph=True, dynamic=False, **how)

    def __call__(self, tokens_B1: Tensor, rows_B: Tensor, lengths_B: Tensor, stop: int) -> Tensor:
        """Logits [B, V] behind tokens_B1, at positions lengths_B of rows_B, all of them int64.

        `stop` is more than the greatest of the lengths.
        """
        device = self._keys.device
        rows_B = rows_B.to(device)
        tokens_R1 = torch.zeros(self._rows, 1, dtype=torch.int64, device=device)
        positions_R1 = torch.full_like(tokens_R1, self._spare)
        tokens_R1[rows_B] = tokens_B1.to(device)
        positions_R1[rows_B, 0] = lengths_B.to(device)
        reach = max(_SHORTEST, 1 << (stop - 1).bit_length())
        torch.compiler.cudagraph_mark_step_begin()
        logits_RV: Tensor = self._compute(tokens_R1, positions_R1, min(reach, self._spare))
        return logits_RV[rows_B]  # a copy: the next pass writes over the others

    def _step(self, tokens_R1: Tensor, positions_R1: Tensor, stop: int) -> Tensor:
        span = StaticSpan(positions_R1, stop)
        x, block = tokens_R1, 0
        for layer, module in self._stage:
            if isinstance(module, TransformerLayer):
                x = module(x, LayerCache(self._keys[block], self._values[block], span))
                block += 1
            elif isinstance(module, Embedding) and layer.forward is None:
                x = module(x, positions_R1.clamp(max=self._spare - 1))
            else:
                x = layer(module, x)
        return x[:, 0]
