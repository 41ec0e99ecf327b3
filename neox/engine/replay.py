"""Finds where a step that came to a NaN or an infinity first had one, by doing it once more.

The step was skipped, so weights, batch and dropout are what they were. Looking for it all along
would cost a pass over every activation; doing it again costs one step, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neox.data.loaders import Batch
from neox.engine.deepspeed import DeepSpeedEngine
from neox.model.block import TransformerLayer

FORWARD, BACKWARD = 0, 1


@dataclass(frozen=True, order=True)
class Fault:
    """The first value on one rank that is not finite. The smallest is the first of several ranks'.

    Of one micro-batch the forward pass comes first, layer by layer, and then the backward pass from
    the last layer to the first. A weight that was bad before has no micro-batch: -1.
    """

    micro_batch: int  # of the step, from 0
    direction: int
    place: int  # of the layer: its index, negative in the backward pass
    rank: int
    name: str  # `{layer}.{module or parameter}`
    what: str  # "weight", "output", "gradient of the output", "gradient"
    value: str  # "nan" or "inf"


def first_fault(
    engine: DeepSpeedEngine, batches: Iterator[Batch], iteration: int, rate: float
) -> Fault | None:
    """Where iteration `iteration`, which was skipped, first had a bad value; None if it has none.

    `batches` are the same again. The engine may not be trained further. Collective over the world;
    the same on every rank.
    """
    found = engine.groups.gather(_bad_weight(engine))
    if not any(found):
        watch = _Watch(engine)
        with watch:
            engine.train_batch(batches, iteration, rate)
        found = engine.groups.gather(watch.first)
    return min((fault for fault in found if fault is not None), default=None)


def _bad_weight(engine: DeepSpeedEngine) -> Fault | None:
    for layer, module in engine.local:
        if not isinstance(module, nn.Module):
            continue
        for name, parameter in module.named_parameters():
            held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
            bad = _bad([held])
            if bad:
                at = (layer.index, engine.groups.rank)
                return Fault(-1, FORWARD, *at, f"{layer.file_index}.{name}", "weight", bad)
    return None


class _Watch:
    """Hooks on every module of this rank while a step is done again. Keeps the first fault."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.first: Fault | None = None
        self._rank = engine.groups.rank
        self._local = [
            (layer.index, module) for layer, module in engine.local if isinstance(module, nn.Module)
        ]
        self._micro_batch = -1
        self._backward_of = 0  # a pipeline's first stages are ahead with the forward passes
        self._hooks: list[Any] = []
        self._replaced: list[tuple[nn.Module, str]] = []

    def __enter__(self) -> None:
        self._hooks.append(self._local[0][1].register_forward_pre_hook(self._count))
        seen: set[int] = set()
        for index, module in self._local:
            for name, inner in module.named_modules(prefix=str(index)):
                if id(inner) not in seen:  # tied layers share theirs
                    seen.add(id(inner))
                    self._hooks.append(inner.register_forward_hook(self._checked(index, name)))
                    self._check_functional(index, name, inner)
            for name, parameter in module.named_parameters(prefix=str(index)):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    check = self._gradient_check(index, name, "gradient")
                    self._hooks.append(parameter.register_hook(check))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for module, method in self._replaced:
            delattr(module, method)

    def _check_functional(self, index: int, name: str, module: nn.Module) -> None:
        """Norms and row-parallel layers are not called as modules: neox/model/block.py."""
        if isinstance(module, TransformerLayer):
            names = {id(inner): at for at, inner in module.named_modules(prefix=name)}
            self._replace(module, "_row_summand", index, lambda row, *_: names[id(row)])
        elif hasattr(module, "apply_with"):
            self._replace(module, "apply_with", index, lambda *_: name)

    def _replace(
        self, module: nn.Module, method: str, index: int, called: Callable[..., str]
    ) -> None:
        run = getattr(module, method)

        def checked(*arguments: Any) -> Any:
            output = run(*arguments)
            self._checked(index, called(*arguments))(module, arguments, output)
            return output

        setattr(module, method, checked)
        self._replaced.append((module, method))

    def _count(self, *_: object) -> None:
        if not _in_backward():
            self._micro_batch += 1

    def _checked(self, index: int, name: str) -> Callable[..., None]:
        def check(module: nn.Module, arguments: object, output: object) -> None:
            if _in_backward():  # computed once more, for the gradients
                return
            tensors = [value for value in _values(output) if isinstance(value, Tensor)]
            self._note(FORWARD, index, name, "output", _bad(tensors))
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(
                        self._gradient_check(index, name, "gradient of the output")
                    )

        return check

    def _gradient_check(self, index: int, name: str, what: str) -> Callable[[Tensor], None]:
        micro_batch = self._micro_batch

        def check(gradient: Tensor) -> None:
            if what != "gradient":
                self._backward_of = micro_batch
            self._note(BACKWARD, -index, name, what, _bad([gradient]))

        return check

    def _note(self, direction: int, place: int, name: str, what: str, bad: str | None) -> None:
        if bad is None:
            return
        micro_batch = self._micro_batch if direction == FORWARD else self._backward_of
        at = (micro_batch, direction, place)
        if self.first is None or at < self._at(self.first):
            self.first = Fault(*at, self._rank, name, what, bad)

    @staticmethod
    def _at(fault: Fault) -> tuple[int, int, int]:
        return fault.micro_batch, fault.direction, fault.place


def _values(output: object) -> Iterable[object]:
    return output if isinstance(output, tuple | list) else (output,)


@torch.no_grad()
def _bad(tensors: Iterable[Tensor]) -> str | None:
    """ "nan", "inf" or None, of numbers that may be on a GPU."""
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return "nan" if bool(torch.isnan(tensor).any()) else "inf"
    return None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
