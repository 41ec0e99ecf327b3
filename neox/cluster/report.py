"""What a user reads of a run that failed: which rank on which host, what the others wait for."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from neox.cluster.ranks import Rank

_OUT_OF_MEMORY = (
    "if nobody did that by hand, the machine ran out of memory (dmesg tells): "
    "use fewer processes, a smaller micro-batch or, to serve, fewer serve_rows"
)


def named(rank: Rank, several_hosts: bool) -> str:
    where = f" on {rank.host}" if several_hosts else ""
    return f"rank {rank.number}{where} (pid {rank.pid})"


def listed(numbers: Iterable[int]) -> str:
    """rank 3; ranks 0, 2, 3"""
    found = sorted(numbers)
    return f"rank{'s' if len(found) != 1 else ''} {', '.join(map(str, found))}"


def explain_status(status: int | None) -> tuple[int, str]:
    """Our exit status, and words for a process's. DeepSpeed passes signal N on as 256 - N."""
    if status is not None and status >= 192:
        status -= 256
    if status is None or status >= 0:
        return status or 1, f"ended with status {status}, without saying why"
    try:
        name = f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        name = f"signal {-status}"
    hint = f"; {_OUT_OF_MEMORY}" if -status == signal.SIGKILL else ""
    return 128 - status, f"was killed by {name}{hint}"


def explain_end(rank: Rank) -> tuple[int, str]:
    if rank.code is None:  # its keeper was killed, and that kills the rank
        return 128 + signal.SIGKILL, "was killed, and its keeper with it"
    return explain_status(rank.code)


def whereabouts(rank: Rank) -> str:
    """What a rank was at when it was last heard of: the iteration, its last collective."""
    state = rank.state
    parts = []
    if state.get("iteration"):
        parts.append(f"in iteration {state['iteration']}")
    elif state.get("doing"):
        parts.append(state["doing"])
    if state.get("call"):
        verb = "waiting in" if state["waiting"] else "after"
        parts.append(f"{verb} {_call(rank)}, since {state['since']:.0f} s")
    return ", ".join(parts) or "before its first message to another rank"


def waiting(ranks: Iterable[Rank]) -> list[str]:
    """How each of `ranks` ended, or what it waits in, a line for those that wait in the same."""
    together: dict[str, list[Rank]] = defaultdict(list)
    over = []
    for rank in ranks:
        if rank.is_over and not rank.is_done:
            over.append(f"  rank {rank.number} {explain_end(rank)[1].partition(';')[0]}")
        elif rank.state.get("waiting"):
            together[f"in {_call(rank)}"].append(rank)
        elif rank.state:
            together[""].append(rank)
    lines = over
    for what, group in sorted(together.items(), key=lambda item: -len(item[1])):
        who = listed(rank.number for rank in group)
        if what:
            since = max(rank.state["since"] for rank in group)
            lines.append(
                f"  {who} wait{'s' if len(group) == 1 else ''} {what}, since {since:.0f} s"
            )
        else:
            lines += [f"  rank {rank.number}: {whereabouts(rank)}" for rank in group]
    return lines


def suspects(ranks: list[Rank]) -> list[Rank]:
    """Of ranks that do not get on, those that keep the others waiting.

    They are not in a collective themselves; where all are, they are behind in their group's.
    """
    outside = [rank for rank in ranks if not rank.state.get("waiting")]
    if outside:
        return outside
    most: dict[str, int] = {}
    for rank in ranks:
        call = _group(rank)
        most[call] = max(most.get(call, 0), rank.state["number"])
    behind = [rank for rank in ranks if rank.state["number"] < most[_group(rank)]]
    return behind or ranks


def lost_hosts(ranks: Iterable[Rank], others: Iterable[Rank]) -> list[str]:
    """The hosts all of whose ranks are among `ranks`."""
    left = {rank.host for rank in others}
    return sorted({rank.host for rank in ranks} - left)


def last_lines(log: Path, most: int) -> list[str]:
    try:
        return log.read_text(errors="replace").splitlines()[-most:]
    except OSError:
        return []


def _call(rank: Rank) -> str:
    state = rank.state
    size = f" ({human_bytes(state['size'])})" if state["size"] else ""
    return f"{state['call']}{size}, call {state['number']:,}"


def _group(rank: Rank) -> str:
    return str(rank.state["call"]).partition(" ")[2]


def human_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
