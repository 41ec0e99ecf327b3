"""Tensors that are made of what is stored when they are asked for, and known before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """`make` computes a tensor of `shape` and `dtype`; it may raise CheckpointError."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class LazyTensors(Mapping[str, Tensor]):
    """Each is made anew when it is looked up, and kept by nobody but the one who did."""

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self._recipes = dict(recipes)

    def __getitem__(self, name: str) -> Tensor:
        recipe = self._recipes[name]
        tensor = recipe.make()
        assert (tensor.shape, tensor.dtype) == (recipe.shape, recipe.dtype), name
        return tensor

    def __contains__(self, name: Any) -> bool:  # Mapping's own would make the tensor
        return name in self._recipes

    def __iter__(self) -> Iterator[str]:
        return iter(self._recipes)

    def __len__(self) -> int:
        return len(self._recipes)

    def described(self, name: str) -> Tensor:
        """A tensor of this shape and precision, on no device."""
        recipe = self._recipes[name]
        return torch.empty(recipe.shape, dtype=recipe.dtype, device="meta")
