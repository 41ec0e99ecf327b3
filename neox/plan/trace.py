"""The real model's layers run on tensors without contents: what they keep, need and send.

torch's FakeTensorMode gives tensors a shape, a type and a device, and nothing else; its process
group "fake" has any number of ranks in one process. So a layer's own forward and backward pass
tells its memory and its messages, and no formula beside it has to be kept true.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology

_RANKS = 1 << 13  # of the world in which groups are planned; a tp group has no more than heads


@dataclass(frozen=True)
class Traced:
    """Of one forward and backward pass of one micro-batch through some layers, on one rank.

    Bytes. `messages` counts (operation, bytes of the whole tensor) of the tp group.
    """

    kept: int  # from forward to backward, of the input too; the output not included
    output: int
    forward_peak: int  # input and output included
    backward_peak: int  # and the gradient of the output
    messages: Counter[tuple[str, int]]

    def extrapolated(self, next_one: Traced, steps: int) -> Traced:
        """What comes `steps` times as far from this one as `next_one`, each number for itself."""

        def at(this: int, following: int) -> int:
            return this + (following - this) * steps

        pairs = zip(self._sorted_messages(), next_one._sorted_messages(), strict=True)
        return Traced(
            at(self.kept, next_one.kept),
            at(self.output, next_one.output),
            at(self.forward_peak, next_one.forward_peak),
            at(self.backward_peak, next_one.backward_peak),
            Counter((name, at(size, following)) for (name, size), (_, following) in pairs),
        )

    def _sorted_messages(self) -> list[tuple[str, int]]:
        return sorted(self.messages.elements())


@contextlib.contextmanager
def planned_world() -> Iterator[None]:
    """torch.distributed with a world that is not there; this process must have started none."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan needs a process in which nothing is distributed"
    dist.init_process_group("fake", rank=0, world_size=_RANKS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def planned_groups(topology: Topology, rank: int = 0) -> ProcessGroups:
    """The place of `rank` in a grid that is planned. Inside `planned_world`."""
    tp_group = dist.new_group(list(range(topology.tp))) if topology.tp > 1 else None
    return ProcessGroups(topology, rank, torch.device("cpu"), tp_group=tp_group, planned=True)


class Trace(TorchDispatchMode):
    """Adds up the memory of what is made while it is entered, and what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.messages: Counter[tuple[str, int]] = Counter()
        self._sizes: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((*args, *kwargs.values())):
            self._meet(tensor, made=False)  # what is unknown was there before
        result = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._note(func.__name__.partition(".")[0], args)
            return result
        for tensor in _tensors((result,)):
            self._meet(tensor, made=True)
        return result

    def restart_peak(self) -> None:
        self.peak = self.live

    def _meet(self, tensor: Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes() if made else 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        operation, whole = _COLLECTIVES[name]
        size = sum(leaf.nbytes for leaf in tree_leaves(args[whole]) if isinstance(leaf, Tensor))
        self.messages[operation, size] += 1


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


# What torch's operators are called here, and which argument is the whole tensor.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "broadcast_": ("broadcast", 0),
}


def run(
    forward: Callable[[Tensor], Tensor], make_input: Callable[[], Tensor], modules: list[nn.Module]
) -> Traced:
    """Trace one pass through `forward`, whose trained parameters have gradients already.

    `modules` are those that it calls.
    """
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
    source, trace = make_input(), Trace()
    with trace:
        y = forward(source.clone())  # as if it came from other layers, which do not keep it
        output = y.untyped_storage().nbytes()
        kept, forward_peak = trace.live - output, trace.peak
        trace.restart_peak()
        if y.requires_grad:
            gradient = torch.empty_like(y)
            y.backward(gradient)
    return Traced(kept, output, forward_peak, trace.peak, trace.messages)
