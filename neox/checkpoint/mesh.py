"""A checkpoint of mesh-transformer-jax: its model shards are shards of tensor parallelism.

Each computes whole heads, a part of the MLP and of the vocabulary, and summands of the biases
behind them, as a tp rank of a NeoX model with a parallel residual does.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from neox.checkpoint.hf.names import interleave
from neox.checkpoint.lazy import LazyTensors, Recipe
from neox.checkpoint.sources import Shard
from neox.config import ModelConfig, mesh
from neox.config.npz import Array
from neox.errors import CheckpointError, ConfigError, DamageError


class MeshFiles:
    """The tensors of step_N/shard_S/P.npz by NeoX's names, each made when it is looked up.

    Sums are made, and stay, in float32: a bfloat16 would keep 8 bits of the embedding's. Layer
    norms are shard 0's, which is the one that JAX uses.
    """

    def __init__(self, folder: Path, config: ModelConfig | None = None) -> None:
        """`config` tells of the heads what no array does. Raises CheckpointError."""
        given = {} if config is None else {key: getattr(config, key) for key in mesh.UNSTORED}
        try:
            self.config = mesh.read_folder(folder, given)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        self.tp = len(self.config.shards)
        self._depth = len(self.config.shards[0].layers)
        self._check_steps()

    @property
    def has_optimizer(self) -> bool:
        return self.config.shards[0].others > 0

    @property
    def indices(self) -> Collection[int]:
        return [0, *range(2, self._depth + 2), self._depth + 3, self._depth + 4]

    def files(self, index: int) -> list[Path]:
        used = [
            array.path
            for shard in self.config.shards
            for array in self._leaves(shard, index).values()
        ]
        return list(dict.fromkeys(used))

    def shards(self, index: int) -> list[Shard]:
        return [self._shard(shard, index) for shard in self.config.shards]

    def _shard(self, shard: mesh.Shard, index: int) -> Shard:
        leaves = self._leaves(shard, index)
        if index == 0:
            recipes = self._embedding(leaves)
        elif index < self._depth + 2:
            recipes = self._layer(leaves, index)
        else:
            recipes = self._projection(leaves, index)
        where = next(iter(leaves.values())).path
        return Shard(where, LazyTensors(recipes), names={name: name for name in recipes})

    def _leaves(self, shard: mesh.Shard, index: int) -> mesh.Leaves:
        if index == 0:
            return shard.embedding
        return shard.projection if index >= self._depth + 2 else shard.layers[index - 2]

    def _embedding(self, leaves: mesh.Leaves) -> dict[str, Recipe]:
        """A token's row and, of every shard, the bias: each adds its own before the sum."""
        table = leaves["linear/w"]
        biases = [shard.embedding["linear/b"] for shard in self.config.shards]

        def make() -> Tensor:
            bias_H = torch.stack([_read(bias).double() for bias in biases]).sum(0)
            return _read(table).float().add_(bias_H.float())

        return {"word_embeddings.weight": Recipe(table.shape, torch.float32, make)}

    def _layer(self, leaves: mesh.Leaves, index: int) -> dict[str, Recipe]:
        first = self._leaves(self.config.shards[0], index)
        query = leaves["linear/w"]
        fused = (3 * query.shape[1], query.shape[0])
        return {
            **_norm("input_layernorm", first),
            "attention.query_key_value.weight": Recipe(
                fused, _dtype(query), partial(self._query_key_value, leaves)
            ),
            "attention.dense.weight": _transposed(leaves["linear_3/w"]),
            "mlp.linear1.weight": _transposed(leaves["linear_4/w"]),
            "mlp.linear1.bias": _as_it_is(leaves["linear_4/b"]),
            "mlp.linear2.weight": _transposed(leaves["linear_5/w"]),
            "mlp.linear2.bias": Recipe(
                leaves["linear_5/b"].shape,
                torch.float32,
                lambda: _read(leaves["linear_5/b"]).float(),
            ),
        }

    def _query_key_value(self, leaves: mesh.Leaves) -> Tensor:
        """For every head its query, key and value, [3h, H]."""
        heads = self.config.values.get("num_attention_heads")
        if heads is None:
            raise CheckpointError(
                f"{self.config.path} does not tell num_attention_heads, without which its tensors "
                "cannot be read. Give --config with the model's heads."
            )
        parts = [_read(leaves[name]).T for name in ("linear/w", "linear_2/w", "linear_1/w")]
        return interleave(heads // self.tp, parts)

    def _projection(self, leaves: mesh.Leaves, index: int) -> dict[str, Recipe]:
        if index == self._depth + 3:
            return _norm("norm", self.config.shards[0].projection)
        return {
            "final_linear.weight": _transposed(leaves["linear/w"]),
            "final_linear.bias": _as_it_is(leaves["linear/b"]),
        }

    def _check_steps(self) -> None:
        """Shards that were saved at different steps have the same shapes."""
        steps = [bytes(shard.step.read()) for shard in self.config.shards]
        for shard, step in zip(self.config.shards, steps, strict=True):
            if step != steps[0]:
                numbers = [int.from_bytes(each, "little") for each in (step, steps[0])]
                raise DamageError(
                    f"{shard.step.path} is of step {numbers[0]}, and "
                    f"{self.config.shards[0].path.name} of step {numbers[1]}: they are not of one "
                    "checkpoint."
                )


def _norm(name: str, leaves: mesh.Leaves) -> dict[str, Recipe]:
    return {
        f"{name}.weight": _as_it_is(leaves["replicated_layer_norm/scale"]),
        f"{name}.bias": _as_it_is(leaves["replicated_layer_norm/offset"]),
    }


def _as_it_is(array: Array) -> Recipe:
    return Recipe(array.shape, _dtype(array), lambda: _read(array))


def _transposed(array: Array) -> Recipe:
    """A matrix [in, out] as torch has it, [out, in]."""
    return Recipe(array.shape[::-1], _dtype(array), lambda: _read(array).T)


def _dtype(array: Array) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, array.dtype)
    return dtype


def _read(array: Array) -> Tensor:
    flat = torch.frombuffer(array.read(), dtype=_dtype(array))
    if array.is_column_major:
        return flat.view(array.shape[::-1]).T
    return flat.view(array.shape)
