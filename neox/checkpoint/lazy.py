"""What is made of a checkpoint's files when it is looked up, and described before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Lazy(Mapping[str, T], Generic[T]):
    """Each value is made anew when it is looked up, and kept by nobody but the one who did."""

    def __init__(self, makers: Mapping[str, Callable[[], T]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> T:
        return self._makers[name]()

    def __contains__(self, name: Any) -> bool:  # Mapping's own would make it
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Recipe:
    """`make` computes a tensor of `shape` and `dtype`; it may raise CheckpointError."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def described(self) -> Tensor:
        """A tensor of this shape and precision, on no device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    @classmethod
    def like(cls, tensor: Tensor, make: Callable[[], Tensor]) -> Recipe:
        """Of the shape and precision of `tensor`."""
        return cls(tuple(tensor.shape), tensor.dtype, make)


class LazyTensors(Lazy[Tensor]):
    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        super().__init__({name: recipe.make for name, recipe in recipes.items()})
        self._recipes = dict(recipes)

    def described(self, name: str) -> Tensor:
        """A tensor of its shape and precision, on no device."""
        return self._recipes[name].described
