"""The grid that fits itself: tp x pp for the devices that are there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from neox.config import agreement
from neox.config.arithmetic import divisors
from neox.config.config import NeoXConfig
from neox.config.draft import SAID, Draft

PROCESSES_PER_CORE = 2
FITTED = ("generate", "evaluate", "serve")  # purposes whose grid may be changed
SIZES = ("model_parallel_size", "pipe_parallel_size")
_CHECKS = agreement.CHECKS.about(*SIZES)


@dataclass(frozen=True)
class Devices:
    """What a run may have: CUDA devices, or processes on a CPU."""

    slots: tuple[int, ...] = ()  # of each host; () on a CPU when nothing says how many
    cores: int = 1  # of that CPU
    all_start: bool = False  # the launcher starts every slot of its hosts; none can stay unused

    @property
    def count(self) -> int:
        return sum(self.slots)


def settle_grid(draft: Draft, config: NeoXConfig, devices: Devices, purpose: str | None) -> int:
    """The number of processes, and where it may be changed, the grid that they make.

    Training and a user's own script take every device, and their grid is never changed. `logits`
    takes the devices of one copy of the model. The others go by this policy:

    - The grid as it is given fits when there are tp * pp devices or more. Whole further copies of
      the model share the prompts, but a server has one copy; the devices that are left over are
      not used.
    - On a CPU where nothing says how many processes there are to be, it fits up to
      PROCESSES_PER_CORE, and is replaced by one process beyond: that has every core, and the
      memory of one set of libraries.
    - A grid that needs more devices than there are was chosen for its memory. So of the grids that
      divide the model (neox.config.agreement) the one is taken that spreads one copy over the most
      devices, and of several, the one whose tp is nearest to the given one.
    - Over several hosts every slot is started, so one copy takes a divisor of their number, and a
      tensor-parallel group stays on one host.

    A grid that is changed, or leaves devices unused, is told in one line.
    """
    copy, there = config.tp * config.pp, devices.count
    if purpose not in FITTED:
        one_copy = purpose == "logits" and copy <= there and not devices.all_start
        return copy if one_copy or not there else there
    if not there and copy <= PROCESSES_PER_CORE * devices.cores:
        return copy
    if copy > there:
        return _replace_grid(draft, config, devices)
    whole = copy if purpose == "serve" else there - there % copy
    world_size = there if devices.all_start else whole
    if world_size < there:
        draft.notes.append(
            f"{_opening(config)} takes {copy} devices and there are {there}: "
            f"{_unused(there - world_size)}"
        )
    return world_size


def _replace_grid(draft: Draft, config: NeoXConfig, devices: Devices) -> int:
    """Put a grid that fits in place of one that is too large; the number of its processes."""
    copy, cores = config.tp * config.pp, devices.cores
    if devices.slots:
        why = f"needs {copy} devices and there {'is' if devices.count == 1 else 'are'} "
        why += f"{devices.count}"
    else:
        why = f"is {copy} processes, more than {PROCESSES_PER_CORE} for each of {cores} "
        why += f"core{'s' * (cores != 1)}"
        devices = Devices((1,))
    found = choose_grid(config, devices, draft.bad)
    if found is None:
        return copy  # no grid will do, this one included: the checks say why
    for key, size in zip(SIZES, found, strict=True):
        if getattr(config, key) != size:
            draft.settle(key, size, "fitted")
    tp, pp = found[0], max(1, found[1])
    dp, unused = divmod(devices.count, tp * pp)
    using = f"using tp {tp} x pp {pp}" + f" x dp {dp}" * (dp > 1)
    using += f", {_unused(unused)}" if unused else ""
    draft.notes.append(f"{_opening(config)} {why}: {using}")
    return tp * pp * dp


def choose_grid(config: NeoXConfig, devices: Devices, bad: set[str]) -> tuple[int, int] | None:
    """model_parallel_size and pipe_parallel_size that divide the model and fit the devices.

    The nearest copy size that is no smaller than the given one, else the largest below it; then as
    `settle_grid` says. pipe_parallel_size stays 0 where it is 0 and one stage does. Checks that
    read keys in `bad` are left out. None when no grid passes the others.
    """
    given = config.tp * config.pp
    copies = [
        copy
        for copy in range(1, devices.count + 1)
        if not (devices.all_start and devices.count % copy)
    ]
    for copy in sorted(copies, key=lambda copy: (copy < given, abs(copy - given))):
        for tp in _by_nearness(divisors(copy), config.tp):
            stages = copy // tp
            pipe = 0 if stages == 1 and config.pipe_parallel_size == 0 else stages
            if _on_one_host(tp, devices) and _divides(config, tp, pipe, bad):
                return tp, pipe
    return None


def advise_grid(config: NeoXConfig, world_size: int, bad: set[str]) -> str:
    """Sizes that would fit a world that the given ones do not divide, as the end of a message."""
    found = choose_grid(config, Devices((world_size,), all_start=True), bad)
    if found is None:
        return "or other sizes."
    sizes = " and ".join(f"{key}: {size}" for key, size in zip(SIZES, found, strict=True))
    return f"or, for {world_size}, {sizes}."


def _by_nearness(choices: list[int], tp: int) -> list[int]:
    return sorted(choices, key=lambda choice: max(choice, tp) / min(choice, tp))


def _on_one_host(tp: int, devices: Devices) -> bool:
    return len(devices.slots) == 1 or all(slots % tp == 0 for slots in devices.slots)


def _divides(config: NeoXConfig, tp: int, pipe: int, bad: set[str]) -> bool:
    candidate = dataclasses.replace(config, model_parallel_size=tp, pipe_parallel_size=pipe)
    return not any(_CHECKS.run(candidate, None, bad))


def _opening(config: NeoXConfig) -> str:
    origins = [config.origin(key) for key in SIZES if config.origin(key) not in SAID]
    return f"grid: tp {config.tp} x pp {config.pp}" + "".join(f" ({o})" for o in origins[:1])


def _unused(devices: int) -> str:
    return f"{devices} {'device is' if devices == 1 else 'devices are'} not used"
