"""The generating model: this rank's stage of the layer list, with plain sends between stages."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neox.config import NeoXConfig
from neox.inference.adapters import NamedAdapters
from neox.inference.cache import CacheView, KVCache
from neox.inference.compiled import CompiledPass, can_compile
from neox.inference.graphs import GraphPass, can_record
from neox.inference.rows import CHUNK
from neox.model.block import TransformerLayer
from neox.model.frozen import Storage
from neox.model.gpt import Embedding, LocalLayers
from neox.model.loss import CHUNK_BYTES
from neox.model.packing import Packing
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import gather_from_tensor_parallel


class InferenceModel:
    """One replica's model, of which this rank holds the layers of its stage.

    Every call is collective over the replica's tp x pp ranks; all pass the same tokens, with the
    same LoRA adapter selected.
    """

    def __init__(
        self,
        config: NeoXConfig,
        groups: ProcessGroups,
        stage: LocalLayers,
        padded_vocab_size: int,
        dtype: torch.dtype,
        adapters: NamedAdapters | None = None,
    ) -> None:
        """`stage` is this rank's consecutive layers with their built modules, on their device.

        Their parameters stay as they are; a training engine may have lent them. `adapters` are
        those that `select` chooses from, none by default.
        """
        self.config = config
        self.groups = groups
        self.device = groups.device
        self.dtype = dtype
        self.padded_vocab_size = padded_vocab_size
        self._stage = stage
        self._adapters = adapters or NamedAdapters()
        self._compiled: WeakKeyDictionary[KVCache, CompiledPass] = WeakKeyDictionary()
        self._graphs: WeakKeyDictionary[KVCache, GraphPass] = WeakKeyDictionary()
        for _, module in self._stage:
            if isinstance(module, nn.Module):
                module.eval()

    @property
    def adapters(self) -> Collection[str]:
        """The names of the LoRA adapters that `select` chooses from."""
        return self._adapters.names

    @property
    def num_local_layers(self) -> int:
        """Transformer layers on this rank."""
        return sum(isinstance(module, TransformerLayer) for _, module in self._stage)

    @property
    def storage(self) -> Storage:
        """How the matrices are held."""
        return next((layer.frozen.storage for layer, _ in self._stage if layer.frozen), "dense")

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights a pass uses on this rank; what two layers share counts once."""
        modules = [module for _, module in self._stage if isinstance(module, nn.Module)]
        held = {
            tensor.data_ptr(): tensor.nbytes
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
        }
        return sum(held.values())

    @property
    def _last_block(self) -> int:
        """The NeoX index of the model's last transformer layer."""
        return self.config.num_layers + 1

    @property
    def is_source(self) -> bool:
        """Whether `broadcast` sends this rank's tensor: one rank of the last stage."""
        return self.groups.is_last_stage and self.groups.tp_rank == 0

    def select(self, adapter: str | None) -> None:
        """Let the passes that follow use this LoRA adapter, or the model as it was loaded.

        Raises RequestError when there is no adapter of that name.
        """
        self._adapters.select(adapter)

    def new_cache(self, rows: int, max_length: int) -> KVCache:
        """An empty cache for this rank's layers and heads."""
        return KVCache(
            num_layers=self.num_local_layers,
            rows=rows,
            kv_heads_local=self.config.kv_heads // self.groups.tp,
            max_length=max_length,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def __call__(
        self,
        tokens_BS: Tensor,
        cache: CacheView | None = None,
        *,
        logits: Literal["all", "last", "none"] = "all",
    ) -> Tensor | None:
        """Logits [B, S, V] in float32 over the padded vocabulary on the last stage, else None.

        With a cache, each row's tokens continue the row of the cache that the view names for it,
        and are added to that. `logits`: the `last` position's only, [B, 1, V], all that decoding
        needs of a prompt, whose whole logits would be S * V * 4 bytes a row; or `none`.
        """
        B, S = tokens_BS.shape
        if cache is not None and self.compiles and (S == 1 or (B == 1 and logits != "all")):
            return self._pass(tokens_BS, cache, logits)
        if cache is not None and S == 1 and self.records:
            return self._replay(tokens_BS, cache)
        wanted = None if logits == "all" or S == 1 else torch.tensor([S - 1])
        x = self._before_head(tokens_BS, wanted, cache=cache)
        if x is None or logits == "none":
            return None
        layer, module = self._stage[-1]
        logits_BSV = gather_from_tensor_parallel(layer(module, x), self.groups)
        return logits_BSV[..., : self.padded_vocab_size].float()

    @property
    def compiles(self) -> bool:
        """Whether a new position of each row is computed by a pass put together once.

        With an adapter selected it is not: that pass is put together of the base's weights.
        """
        return self._adapters.selected is None and self._base_compiles

    @cached_property
    def _base_compiles(self) -> bool:
        asked = self.config.compile_decoding is not False
        return asked and can_compile(self.config, self.groups, self._stage)

    @property
    def records(self) -> bool:
        """Whether a new position of each row is computed by a graph: on CUDA. See `compiles`."""
        return self._adapters.selected is None and self._base_records

    @cached_property
    def _base_records(self) -> bool:
        return self.config.compile_decoding is True and can_record(self.groups, self._stage)

    def _replay(self, tokens_B1: Tensor, cache: CacheView) -> Tensor:
        """What `__call__` returns, by a graph."""
        memory, span = cache.memory, cache.span
        if memory not in self._graphs:
            keys, values = memory.keys_LRKTD, memory.values_LRKTD
            self._graphs[memory] = GraphPass(self._stage, keys, values)
        logits_BV = self._graphs[memory](tokens_B1, span.rows_B, span.lengths_B, span.stop)
        return logits_BV[:, None, : self.padded_vocab_size].float()

    def _pass(self, tokens_BS: Tensor, cache: CacheView, logits: str) -> Tensor | None:
        """What `__call__` returns, by the kernels: one new position of each row, or many of one."""
        memory, span = cache.memory, cache.span
        compiled = self._compiled.get(memory)
        if compiled is None:
            keys, values = memory.keys_LRKTD, memory.values_LRKTD
            most = max(memory.rows, min(CHUNK, memory.max_length))
            compiled = CompiledPass(self.config, self._stage, keys, values, most)
            self._compiled[memory] = compiled
        if self.groups.is_first_stage:
            x = self._stage[0][1](tokens_BS, span.positions_BS)
        else:
            x = self._receive(*tokens_BS.shape, None)
        B, S = tokens_BS.shape
        rows_P = span.rows_B.repeat_interleave(S)
        lengths_P = (span.lengths_B[:, None] + torch.arange(S)).flatten()
        wanted = {"all": slice(None), "last": slice(-B, None), "none": slice(0)}[logits]
        y = compiled(x.view(B * S, -1), rows_P, lengths_P, wanted)
        if not self.groups.is_last_stage:
            self._send(y)
            return None
        return None if logits == "none" else y[:, None, : self.padded_vocab_size]

    @torch.inference_mode()
    def hidden(self, tokens_S: Tensor, packing: Packing, wanted_U: Tensor) -> Tensor | None:
        """What the output projection gets, [U, H], of the tokens of a row that are wanted.

        `wanted_U` are indices into the row. None before the last stage.
        """
        x_BUH = self._before_head(tokens_S[None], wanted_U, packing=packing.to(self.device))
        return None if x_BUH is None else x_BUH[0]

    @torch.inference_mode()
    def target_scores(self, hidden_UH: Tensor, rows_K: Tensor, targets_K: Tensor) -> Tensor:
        """How likely each target is behind its row of `hidden_UH`, several of which may be one.

        float32 [K, 2]: log-probability, and 1 if the target is the likeliest. Natural logarithm;
        the softmax is over the padded vocabulary, as in training. Few logits are there at a time.
        Collective over the last stage's tp ranks.
        """
        head = self._stage[-1][1]
        scores_K2 = torch.empty(len(rows_K), 2, device=self.device)
        rows_K, targets_K = rows_K.to(self.device), targets_K.to(self.device)
        start = 0
        for part_UH in hidden_UH.split(self.logit_rows):
            stop = start + len(part_UH)
            here = ((rows_K >= start) & (rows_K < stop)).nonzero()[:, 0]
            scores_K2[here] = head.score(
                part_UH, rows_K[here] - start, targets_K[here], self.padded_vocab_size
            )
            start = stop
        return scores_K2

    @property
    def logit_rows(self) -> int:
        """Positions whose logits `target_scores` has at a time; products like multiples of 64."""
        most = max(1, CHUNK_BYTES * self.groups.tp // (4 * self.padded_vocab_size))
        return most - most % 64 or most

    def _before_head(
        self,
        tokens_BS: Tensor,
        wanted: Tensor | None,
        *,
        cache: CacheView | None = None,
        packing: Packing | None = None,
    ) -> Tensor | None:
        """The head's input, [B, S, H] or of the positions that are `wanted`, on the last stage."""
        tokens_BS = tokens_BS.to(self.device)
        wanted = None if wanted is None else wanted.to(self.device)
        x = tokens_BS
        if not self.groups.is_first_stage:
            x = self._receive(*tokens_BS.shape, wanted)
        positions = None if packing is None else packing.positions_S
        if cache is not None:
            assert cache.span.positions_BS.shape == tokens_BS.shape, "a view is for one pass"
            positions = cache.span.positions_BS
        blocks = 0
        for layer, module in self._stage[: -1 if self.groups.is_last_stage else None]:
            if isinstance(module, TransformerLayer):
                here = cache.layer(blocks) if cache is not None else None
                x = module(x, here, packing, wanted if layer.index == self._last_block else None)
                blocks += 1
            elif isinstance(module, Embedding):
                x = module(x, positions)
            else:
                x = layer(module, x)
        if not self.groups.is_last_stage:
            self._send(x)
            return None
        return x

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` on every rank of the replica with that of the rank that `is_source`.

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

    def _receive(self, batch: int, length: int, wanted: Tensor | None) -> Tensor:
        first = self._stage[0][0].index
        if wanted is not None and first > self._last_block:
            length = len(wanted)  # the last block came before and let no others through
        shape = (length, batch) if 1 < first < self._last_block + 2 else (batch, length)
        x = torch.empty(*shape, self.config.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(x, self.groups.stage_rank(self.groups.pp_rank - 1), group=self.groups.pp_group)
        return x
