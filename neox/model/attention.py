"""Causal self-attention over this rank's heads, with an optional key/value cache.

Shapes: S positions, B batch, N local query heads, K local key/value heads, D head size, H hidden.
q_SBND: [S, B, N, D].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neox.config import ModelConfig
from neox.model.cached_attention import LayerCache, attend_cached
from neox.model.cpu_attention import LONGEST, causal_attention
from neox.model.packing import Packing
from neox.model.positions import RotaryTable, rotate_
from neox.model.projection import project
from neox.parallel.groups import ProcessGroups
from neox.parallel.layers import column_linear, row_linear
from neox.parallel.rng import DropoutStreams


class Attention(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        groups: ProcessGroups,
        rotary: RotaryTable | None,
        streams: DropoutStreams | None,
    ) -> None:
        super().__init__()
        self.heads = config.num_attention_heads // groups.tp
        self.kv_heads = config.kv_heads // groups.tp
        self.head_dim = config.head_dim
        self.window = config.sliding_window_width
        self.dropout = config.attention_dropout
        self.rotary = rotary
        self.streams = streams
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.kv_heads * config.head_dim
        bias = config.use_bias_in_attn_linear
        self.query_key_value = column_linear(
            config.hidden_size,
            q_size + 2 * kv_size,
            bias,
            dtype,
            groups,
        )
        self.dense = row_linear(q_size, config.hidden_size, bias, dtype, groups)

    def forward(
        self, x_SBH: Tensor, cache: LayerCache | None = None, packing: Packing | None = None
    ) -> Tensor:
        """This rank's heads' contexts, [S, B, N * D]: the input of `dense`.

        With a packing, B is 1 and the row is many texts.
        """
        qkv = project(self.query_key_value, x_SBH)
        if packing is not None:
            return self._attend_packed(qkv, packing)
        if self.rotary is not None:
            if cache is not None:
                cos, sin = cache.span.angles(self.rotary, like=qkv)
            else:
                cos, sin = self.rotary.angles(qkv.shape[0], like=qkv)
            qkv = rotate_(self._split_heads, qkv, cos, sin, self.rotary.interleaved)
        q, k, v = (heads.permute(1, 2, 0, 3) for heads in self._split_heads(qkv))
        if cache is not None:
            context_BNSD = attend_cached(q, k, v, cache, self.window)
        else:
            context_BNSD = self._attend(q, k, v, self._mask(q.shape[2], q.device))
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S, B, _ = qkv.shape
        if self.kv_heads == self.heads:
            # Query, key and value are interleaved per head: [head 0: q k v, head 1: q k v, ...].
            qkv = qkv.view(S, B, self.heads, 3 * self.head_dim)
            q, k, v = qkv.chunk(3, dim=-1)
            return q, k, v
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.view(S, B, -1, self.head_dim) for part in qkv.split(sizes, dim=-1))
        return q, k, v

    def _attend_packed(self, qkv: Tensor, packing: Packing) -> Tensor:
        if self.rotary is not None:
            longest = packing.tokens_GL.shape[1]
            cos, sin = self.rotary.angles_at(packing.positions_S[:, None], longest, like=qkv)
            qkv = rotate_(self._split_heads, qkv, cos, sin, self.rotary.interleaved)
        heads = self._split_heads(packing.spread(qkv[:, 0]))
        q, k, v = (heads_GLND.transpose(1, 2) for heads_GLND in heads)
        context_GNLD = self._attend(q, k, v, packing.mask(self.window))
        return packing.collect(context_GNLD.transpose(1, 2).flatten(2))[:, None]

    def _attend(
        self, q_BNSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | None
    ) -> Tensor:
        """`mask` of allowed pairs; None where plain causality, or nothing, forbids any."""
        S = q_BNSD.shape[2]
        dropout = self.dropout if self.training else 0.0
        plain = mask is None and not dropout and self.heads == self.kv_heads
        if plain and self._trains_on_cpu(q_BNSD) and S <= LONGEST:
            return causal_attention(q_BNSD, k_BKSD, v_BKSD)

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(
                q_BNSD,
                k_BKSD,
                v_BKSD,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and S > 1,
                enable_gqa=self.heads != self.kv_heads,
            )

        if dropout and self.streams is not None:
            with self.streams.local():
                return attend()
        return attend()

    @staticmethod
    def _trains_on_cpu(q_BNSD: Tensor) -> bool:
        return (
            q_BNSD.requires_grad and q_BNSD.device.type == "cpu" and q_BNSD.dtype == torch.float32
        )

    def _mask(self, S: int, device: torch.device) -> Tensor | None:
        """[S, S] of allowed pairs, or None where plain causality says it all.

        A query at position i sees keys i - window ... i, upstream's flash-attention window.
        """
        if self.window is None or self.window + 1 >= S:
            return None
        allowed = torch.ones(S, S, dtype=torch.bool, device=device).tril()
        return allowed.triu(-self.window)
