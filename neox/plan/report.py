"""A plan as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neox.config import NeoXConfig
from neox.plan.generation import Generation
from neox.plan.memory import StageMemory
from neox.plan.search import LIBRARIES, Candidate
from neox.plan.state import offloads
from neox.plan.work import Work

_SHOWN = 10  # grids of a search

_MEANING = {
    "weights": "the stage's share of the model",
    "gradients": "one for each weight that is trained",
    "optimizer": "the optimizer's state, and fp32 weights",
    "activations": "kept from forward to backward",
    "temporary": "on top, at the worst moment",
}


@dataclass(frozen=True)
class Plan:
    """All that is known of one configuration."""

    config: NeoXConfig
    parameters: int
    device: str  # what a rank runs on
    memory: float  # bytes of it
    stages: Sequence[StageMemory]
    generation: Sequence[Generation]  # by stage
    work: Work
    time: dict[str, float]  # what neox.plan.time says, by name; empty without a cluster

    @property
    def needed(self) -> int:
        return max(stage.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.needed + LIBRARIES <= self.memory


def show(plan: Plan) -> str:
    """The table on the console."""
    config = plan.config
    lines = [
        f"model       {plan.parameters:,} parameters, trained in {config.dtype}",
        f"grid        {config.world_size} rank{'s' * (config.world_size > 1)}: tp {config.tp} x "
        f"pp {config.pp} x dp {config.dp} (tensor, pipeline, data parallel), "
        f"ZeRO {config.engine_zero_stage}",
        f"step        {config.gradient_accumulation_steps} x "
        f"{config.train_micro_batch_size_per_gpu} sequences of {config.seq_length} tokens on each "
        f"of {config.dp} replica{'s' * (config.dp > 1)}: {plan.work.tokens:,} tokens",
        f"activations {_recomputation(config)}",
        "",
        "memory of a rank, by pipeline stage",
        *_memory_table(plan.stages),
        "",
        _verdict(plan),
        *_estimated(config),
        "",
        "messages of a rank in one step",
        *_message_table(plan.work),
        "",
        f"to generate, a rank holds {size(max(one.weights for one in plan.generation))} of weights "
        f"and {size(max(one.cache for one in plan.generation))} of keys and values for each "
        f"sequence of {config.seq_length} tokens",
    ]
    if plan.time:
        lines += ["", "time", *_table([[name, _number(v)] for name, v in plan.time.items()])]
    return "\n".join(lines)


def show_search(found: Sequence[Candidate], memory: float, seconds: float) -> str:
    """The best grids; `seconds` is what the search took."""
    fitting = [c for c in found if c.fits]
    timed = bool(fitting) and fitting[0].seconds is not None
    order = "fastest first" if timed else "least memory first"
    lines = [
        f"search      {len(found)} grids, {len(fitting)} fit {size(memory)}; {order}; "
        f"{seconds:.1f} s",
    ]
    head = ["tp", "pp", "dp", "micro-batches", "of", "recomputes", "needs"]
    head += ["step"] if timed else []
    rows = [head]
    for candidate in (fitting or list(found))[:_SHOWN]:
        c = candidate.config
        row = [c.tp, c.pp, c.dp, c.gradient_accumulation_steps, c.train_micro_batch_size_per_gpu]
        cells = [str(cell) for cell in row]
        cells += ["yes" if c.checkpoint_activations else "no", size(candidate.needed)]
        cells += [f"{candidate.seconds:.3g} s"] if candidate.seconds is not None else []
        rows.append(cells)
    return "\n".join([*lines, *_table(rows)])


def show_nearest(found: Candidate | None, tried: Sequence[int]) -> str:
    """Advice for a configuration that does not fit."""
    if found is None:
        return f"nearest     no grid of up to {tried[-1]} devices fits"
    return (
        f"nearest     {found.name} on {found.config.world_size} devices needs {size(found.needed)}"
    )


def as_json(plan: Plan, found: Sequence[Candidate]) -> dict[str, Any]:
    """Bytes, counts and seconds, by the names of neox.plan's values."""
    config = plan.config
    grid = {"tp": config.tp, "pp": config.pp, "dp": config.dp}
    return {
        "parameters": plan.parameters,
        "dtype": config.dtype,
        "grid": grid,
        "zero_stage": config.engine_zero_stage,
        "micro_batches": config.gradient_accumulation_steps,
        "tokens": plan.work.tokens,
        "device": {"name": plan.device, "memory": plan.memory, "libraries": LIBRARIES},
        "needed": plan.needed,
        "fits": plan.fits,
        "time": plan.time,
        "stages": [
            {
                **dataclasses.asdict(memory),
                "total": memory.total,
                "generation": dataclasses.asdict(generation),
                "work": dataclasses.asdict(work),
            }
            for memory, generation, work in zip(
                plan.stages, plan.generation, plan.work.stages, strict=True
            )
        ],
        "search": [
            {
                "tp": c.config.tp,
                "pp": c.config.pp,
                "dp": c.config.dp,
                "micro_batch": c.config.train_micro_batch_size_per_gpu,
                "micro_batches": c.config.gradient_accumulation_steps,
                "checkpoint_activations": c.config.checkpoint_activations,
                "needed": c.needed,
                "fits": c.fits,
                "seconds": c.seconds,
            }
            for c in found
        ],
    }


def size(count: float) -> str:
    """Bytes in units of 1000, as memory of devices is sold."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _recomputation(config: NeoXConfig) -> str:
    if not config.checkpoint_activations:
        return "all kept for the backward pass (checkpoint_activations: false)"
    layers = config.checkpoint_num_layers
    which = "each layer's" if layers == 1 else f"every {layers} layers'"
    return f"{which} input is kept, the rest computed again (checkpoint_activations)"


def _memory_table(stages: Sequence[StageMemory]) -> list[str]:
    rows = [["", *(f"stage {number}" for number in range(len(stages))), ""]]
    rows.append(["layers", *(str(stage.layers) for stage in stages), ""])
    for name, meaning in _MEANING.items():
        rows.append([name, *(size(getattr(stage, name)) for stage in stages), meaning])
    rows.append(["peak", *(size(stage.total) for stage in stages), ""])
    flying = [str(stage.in_flight) for stage in stages]
    rows.insert(6, ["  of batches", *flying, "micro-batches in flight at once"])
    if any(stage.host for stage in stages):
        rows.append(["offloaded", *(size(stage.host) for stage in stages), "in the CPU's memory"])
    return _table(rows)


def _verdict(plan: Plan) -> str:
    together = f"{size(plan.needed)} + {size(LIBRARIES)} for the libraries"
    there = f"{size(plan.memory)} of {plan.device}"
    return f"fits        {'yes' if plan.fits else 'NO'}: {together}, and {there} for each rank"


def _estimated(config: NeoXConfig) -> list[str]:
    """What of a plan is less sure than the rest."""
    lines = []
    if config.engine_zero_stage == 3 and config.dp > 1:
        lines.append(
            "estimate    ZeRO 3: temporary has as many gathered weights as DeepSpeed may keep "
            "(stage3_max_live_parameters); it joins and parts messages as its buckets are"
        )
    if offloads(config, "offload_optimizer") or offloads(config, "offload_param"):
        lines.append(
            "estimate    offloading: times have neither the way to the CPU's memory and back nor "
            "the step there"
        )
    return lines


def _message_table(work: Work) -> list[str]:
    counts: dict[tuple[str, str], list[Counter[str]]] = {}
    for number, stage in enumerate(work.stages):
        for message in stage.messages:
            key = message.operation, message.axis
            per_stage = counts.setdefault(key, [Counter() for _ in work.stages])
            per_stage[number].update(count=message.count, bytes=message.bytes)
    if not counts:
        return ["  none"]
    rows = [["", *(f"stage {number}" for number in range(len(work.stages)))]]
    for (operation, axis), stages in sorted(counts.items(), key=lambda item: item[0][::-1]):
        cells = [f"{s['count']} x, {size(s['bytes'])}" if s else "-" for s in stages]
        rows.append([f"{axis} {operation}", *cells])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side; the first and a last one of words to the left, others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_line(row, widths).rstrip() for row in rows]


def _line(row: Sequence[str], widths: Iterable[int]) -> str:
    cells = []
    for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
        words = column == 0 or (column == len(row) - 1 and len(cell) > 14)
        cells.append(cell.ljust(width) if words else cell.rjust(width))
    return "  " + "  ".join(cells)


def _number(value: float) -> str:
    """Four digits, and counts of some thousands or millions whole."""
    return f"{value:,.0f}" if 1e4 <= value < 1e10 else f"{value:.4g}"
