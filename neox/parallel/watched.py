"""Every collective, noted in this process's page (neox.progress) when it begins and ends.

torch.distributed's functions are wrapped once, before megatron-core and DeepSpeed are imported,
which call the same ones. It costs about a microsecond a call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from neox import progress
from neox.parallel.topology import Topology

_COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "gather"),
    *("reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "scatter"),
    *("all_to_all", "all_to_all_single", "broadcast", "barrier", "send", "recv"),
    *("isend", "irecv", "batch_isend_irecv"),
)
_PEERS = ("dst", "src")  # of what goes between two ranks only
_BETWEEN_TWO = ("send", "recv", "isend", "irecv")


class _Watch:
    """The names of groups, and how many calls each has had."""

    def __init__(self, topology: Topology) -> None:
        self._world_size = topology.world_size
        self._axes = {
            tuple(ranks): name
            for name, axes in (("replica", ("pp", "tp")), ("pp", ("pp",)), ("dp", ("dp",)))
            for ranks in topology.groups(*axes)
        } | {tuple(ranks): "tp" for ranks in topology.groups("tp")}
        self._calls: dict[tuple[str, str, Any], list[Any]] = {}  # -> name, its group's counter
        self._counts: dict[str, list[int]] = {}  # by group

    def call(self, function: str, group: Any, peer: Any) -> list[Any]:
        key = (function, "" if group is None else group.group_name, peer)
        known = self._calls.get(key)
        if known is None:
            known = self._calls[key] = self._new(function, group, peer)
        return known

    def _new(self, function: str, group: Any, peer: Any) -> list[Any]:
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        name = f"ranks {', '.join(map(str, ranks))}"
        if len(ranks) == self._world_size:
            name = "all ranks"
        name = name if group is None else self._axes.get(ranks, name)
        way = {"send": "to", "isend": "to", "recv": "from", "irecv": "from"}.get(function)
        with_whom = f" {way} rank {peer}" if way and isinstance(peer, int) else f" of {name}"
        counter = self._counts.setdefault(",".join(map(str, ranks)), [0])
        return [f"{function}{with_whom}".encode(), counter]


def install(topology: Topology, patience_s: float) -> None:
    """Wrap the functions of torch.distributed; call once, and before they are bound elsewhere.

    Groups wait for `patience_s` seconds at least, also those that libraries make with half an hour
    or, for NCCL, ten minutes: whoever watches the pages is to judge a hang, not the innocent.
    """
    for name in ("init_process_group", "new_group"):
        _put(name, _patient(getattr(dist, name), timedelta(seconds=patience_s)))
    watch = _Watch(topology)
    for name in _COLLECTIVES:
        function = getattr(dist, name, None)
        if function is None:
            continue
        _put(name, _wrapped(function, name, watch))
    dist.Work.wait = _waiting(dist.Work.wait)  # type: ignore[method-assign]


def _waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of what goes on beside the computation, as in a pipeline: it is here that it may hang."""
    page = progress.page()

    @functools.wraps(function)
    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        page.wait(True)
        result = function(self, *args, **kwargs)
        page.wait(False)
        return result

    return wait


def _put(name: str, wrapped: Callable[..., Any]) -> None:
    function = getattr(dist, name)
    for module in (dist, dist.distributed_c10d):
        if getattr(module, name, None) is function:
            setattr(module, name, wrapped)


def _patient(function: Callable[..., Any], least: timedelta) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        timeout = given.arguments.get("timeout")
        given.arguments["timeout"] = least if timeout is None else max(least, timeout)
        return function(*given.args, **given.kwargs)

    return wrapper


def _wrapped(function: Callable[..., Any], name: str, watch: _Watch) -> Callable[..., Any]:
    page = progress.page()
    parameters = list(inspect.signature(function).parameters)
    group_at = parameters.index("group") if "group" in parameters else None
    peers = [peer for peer in _PEERS if peer in parameters and name in _BETWEEN_TWO]
    peer_at = parameters.index(peers[0]) if peers else None

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        if group is None and group_at is not None and len(args) > group_at:
            group = args[group_at]
        peer = None
        if peer_at is not None:
            peer = args[peer_at] if len(args) > peer_at else kwargs.get(peers[0])
        try:
            label, counter = watch.call(name, group, peer)
        except (AttributeError, RuntimeError, ValueError):  # no such group: torch will say so
            return function(*args, **kwargs)
        counter[0] += 1
        number, size = counter[0], _bytes(args[0] if args else next(iter(kwargs.values()), None))
        page.begin_call(label, number, size)
        result = function(*args, **kwargs)
        page.end_call(label, number, size)
        return result

    return wrapper


def _bytes(what: Any) -> int:
    if isinstance(what, Tensor):
        return what.nbytes
    if isinstance(what, list):
        return sum(_bytes(getattr(each, "tensor", each)) for each in what)
    return 0
