"""The generating model: this rank's stage of the layer list, with plain sends between stages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.inference.cache import KVCache
from neox.model.block import TransformerLayer
from neox.model.gpt import Embedding, FinalNorm, LocalLayers
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import gather_from_tensor_parallel


class InferenceModel:
    """One replica's model, of which this rank holds the layers of its stage.

    Every call is collective over the replica's tp x pp ranks; all pass the same tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: ProcessGroups,
        stage: LocalLayers,
        padded_vocab_size: int,
        dtype: torch.dtype,
    ) -> None:
        """`stage` is this rank's consecutive layers with their built modules, on their device.

        Their parameters stay as they are; a training engine may have lent them.
        """
        self.config = config
        self.groups = groups
        self.device = groups.device
        self.dtype = dtype
        self.padded_vocab_size = padded_vocab_size
        self._stage = stage
        for _, module in self._stage:
            if isinstance(module, nn.Module):
                module.eval()

    @property
    def is_last_stage(self) -> bool:
        return self.groups.is_last_stage

    @property
    def num_local_layers(self) -> int:
        """Transformer layers on this rank."""
        return sum(isinstance(module, TransformerLayer) for _, module in self._stage)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for this rank's layers and heads."""
        return KVCache(
            num_layers=self.num_local_layers,
            batch_size=batch_size,
            kv_heads_local=self.config.kv_heads // self.groups.tp,
            max_length=max_length,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def __call__(
        self, tokens_BS: Tensor, cache: KVCache | None = None, *, last_only: bool = False
    ) -> Tensor | None:
        """Logits [B, S, V] in float32 over the padded vocabulary on the last stage, else None.

        With a cache, the tokens continue at position cache.length and are added to it. With
        `last_only` the logits are those of the last position, [B, 1, V]: all that decoding needs
        of a prompt, whose whole logits would be S * V * 4 bytes a row.
        """
        x = tokens_BS.to(self.device)
        if not self.groups.is_first_stage:
            x = self._receive(*tokens_BS.shape, last_only)
        start = cache.length if cache is not None else 0
        blocks = 0
        for layer, module in self._stage:
            if isinstance(module, TransformerLayer):
                x = module(x, cache.layer(blocks) if cache is not None else None)
                blocks += 1
            elif isinstance(module, Embedding) and layer.forward is None:
                x = module(x, start)
            elif isinstance(module, FinalNorm) and last_only:
                x = module(x[:, -1:])
            else:
                x = layer(module, x)
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        if not self.groups.is_last_stage:
            self._send(x)
            return None
        logits_BSV = gather_from_tensor_parallel(x, self.groups)
        return logits_BSV[..., : self.padded_vocab_size].float()

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` on every rank of the replica with the last stage's first tp rank's.

        Collective over the replica; every rank passes the same shape and dtype.
        """
        if self.groups.replica_group is not None:
            at = self.groups.topology.coordinate(self.groups.rank)
            source = self.groups.topology.rank(self.groups.pp - 1, at.dp, 0)
            dist.broadcast(tensor, source, group=self.groups.replica_group)
        return tensor

    # Training may split stages between any two layers (pipe_partition_method), so what travels is
    # the input of the receiver's first layer.

    def _send(self, x: Tensor) -> None:
        to = self.groups.stage_rank(self.groups.pp_rank + 1)
        dist.send(x.contiguous(), to, group=self.groups.pp_group)

    def _receive(self, batch: int, length: int, last_only: bool) -> Tensor:
        first = self._stage[0][0].index
        norm = self.config.num_layers + 3
        if last_only and first > norm:
            length = 1  # the norm came before and let one position through
        shape = (length, batch) if 1 < first < norm else (batch, length)
        x = torch.empty(*shape, self.config.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(x, self.groups.stage_rank(self.groups.pp_rank - 1), group=self.groups.pp_group)
        return x
