"""The simulated pipeline: DeepSpeed's order, known formulas, and a real pipeline's bubble."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe import engine as pipe_engine
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule

from neox.data.loaders import Batch
from neox.engine.build import build_engine
from neox.errors import ConfigError
from neox.parallel.groups import initialize
from neox.parallel.topology import Topology
from neox.plan.picture import as_text, draw
from neox.plan.schedule import Pass, passes, pipeline_seconds, simulate
from tests.models import VOCAB, config_of, tokens
from tests.world import World


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 7, 8, 9])
def test_the_order_is_that_of_deepspeed(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        theirs: list[Pass] = []
        counts = {True: itertools.count(), False: itertools.count()}
        for commands in TrainSchedule(micro_batches, stages, stage).steps():
            for command in commands:
                if isinstance(command, ForwardPass | BackwardPass):
                    is_forward = isinstance(command, ForwardPass)
                    theirs.append(Pass(is_forward, next(counts[is_forward])))
        assert passes("1f1b", stages, stage, micro_batches) == theirs


@pytest.mark.parametrize("order", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (4, 8), (8, 32), (5, 3)])
def test_even_stages_wait_as_the_formula_says(order: Any, stages: int, micro_batches: int) -> None:
    timeline = simulate([1.0] * stages, [2.0] * stages, micro_batches, order)
    steps = micro_batches + stages - 1
    assert timeline.seconds == 3 * steps
    assert timeline.bubble == pytest.approx((stages - 1) / steps)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [(4, 8, 2), (8, 48, 2), (5, 10, 3)])
def test_interleaving_divides_the_bubble(stages: int, micro_batches: int, chunks: int) -> None:
    """Section 2.2.2 of arXiv:2104.04473: (p - 1) (f + b) / v."""
    timeline = simulate([1.0] * stages, [2.0] * stages, micro_batches, chunks=chunks)
    assert timeline.seconds == pytest.approx(3 * (micro_batches + (stages - 1) / chunks))


def test_sends_keep_both_stages() -> None:
    """Of two stages, each sends once and receives once for a micro-batch."""
    alone, sending = (simulate([1.0, 1.0], [2.0, 2.0], 8, send=x) for x in (0.0, 0.25))
    assert alone.seconds == 27
    assert sending.seconds == 27 + 8 * 2 * 0.25


def test_a_long_step_is_as_long_as_its_simulation() -> None:
    for stages, micro_batches, send in itertools.product((2, 3, 7), (5, 24, 61), (0.0, 0.3)):
        forward = [1.0 + 0.3 * (i % 3) for i in range(stages)]
        backward = [2.0 + 0.7 * (i % 2) for i in range(stages)]
        whole = simulate(forward, backward, micro_batches, send=send).seconds
        assert pipeline_seconds(forward, backward, micro_batches, send=send) == pytest.approx(whole)


def test_the_text_shows_every_stage() -> None:
    timeline = simulate([1.0, 1.0], [2.0, 2.0], 2)
    assert as_text(timeline, width=9).splitlines() == [
        "stage 0  01..aa.bb",
        "stage 1  .0aa1bb..",
    ]


def test_pictures_are_files_of_their_kind(tmp_path: Path) -> None:
    timeline = simulate([1.0] * 4, [2.0] * 4, 8)
    draw(timeline, tmp_path / "a.png")
    draw(timeline, tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    with pytest.raises(ConfigError, match=r"ends with \.png, \.svg, \.pdf"):
        draw(timeline, tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="4096 passes"):
        draw(simulate([1.0] * 4, [2.0] * 4, 512), tmp_path / "a.png")


# What a stage's passes take in place of a large model's: the processor is free meanwhile, so that
# four stages do not wait for two cores.
FORWARD_S = 0.06
STEPS = 3  # the quickest counts: in the first, shapes are exchanged, and others use the machine
Interval = tuple[float, float]  # start, end; by a clock that all processes share


def run_pipeline(rank: int, layers: list[int], cases: list[int]) -> dict[int, list[list[Interval]]]:
    """The passes of this rank's stage in some steps, for each number of micro-batches."""
    stages = len(layers)
    groups = initialize(Topology(pp=stages), "gloo", torch.device("cpu"))
    seen: list[Interval] = []
    for kind, factor in ((ForwardPass, 1), (BackwardPass, 2)):
        instructions = pipe_engine.PipelineEngine._INSTRUCTION_MAP
        instructions[kind] = timed(instructions[kind], factor * layers[rank] * FORWARD_S, seen)
    found = {}
    for micro_batches in cases:
        config = config_of(
            world_size=stages,
            num_layers=stages,
            pipe_parallel_size=stages,
            train_micro_batch_size_per_gpu=2,
            gradient_accumulation_steps=micro_batches,
        )
        engine = build_engine(config, groups, VOCAB)
        source = batches()
        found[micro_batches] = []
        for step in range(STEPS):
            seen.clear()
            engine.train_batch(source, 1 + step, 0.01)
            found[micro_batches].append(list(seen))
    return found


def timed(instruction: Any, seconds: float, seen: list[Interval]) -> Any:
    def run(engine: Any, buffer_id: int) -> None:
        start = time.monotonic()
        instruction(engine, buffer_id)
        time.sleep(max(0.0, start + seconds - time.monotonic()))
        seen.append((start, time.monotonic()))

    return run


def batches() -> Iterator[Batch]:
    for step in itertools.count():
        text = tokens(batch=2, length=17, seed=step)
        yield Batch(text[:, :-1], text[:, 1:], torch.ones(2, 16))


def length(stages: Sequence[list[Interval]]) -> float:
    """Seconds from the first pass's start to the last one's end."""
    flat = [interval for stage in stages for interval in stage]
    return max(end for _, end in flat) - min(start for start, _ in flat)


def share(stages: Sequence[list[Interval]]) -> float:
    """Of the stages' time, what no pass takes."""
    busy = sum(end - start for stage in stages for start, end in stage)
    return 1 - busy / (len(stages) * length(stages))


@pytest.mark.parametrize("layers", [[1, 1], [2, 1], [1, 1, 1, 1], [2, 1, 2, 1]], ids=str)
def test_the_bubble_is_that_of_a_real_pipeline(layers: list[int], world: World) -> None:
    """Within 10 % of the measured share. What a message takes, its processes' turns on a busy
    machine included, is taken from the step of one micro-batch, which has nothing but them and the
    passes in a row."""
    cases = [1, 2, 4, 8]
    ranks = world.run(len(layers), run_pipeline, layers, cases)
    steps = {m: list(zip(*(found[m] for found in ranks), strict=True)) for m in cases}
    measured = {m: min((length(s), share(s)) for s in steps[m]) for m in cases}
    forward = [count * FORWARD_S for count in layers]
    backward = [2 * seconds for seconds in forward]
    computing = sum(forward) + sum(backward)
    send = (measured[1][0] - computing) / (2 * (len(layers) - 1))
    assert 0 <= send < FORWARD_S / 2
    for m in cases:
        seconds = simulate(forward, backward, m, send=send).seconds
        simulated = 1 - m * computing / (len(layers) * seconds)
        print(f"{layers} {m}: simulated {simulated:.3f}, measured {measured[m][1]:.3f}")
        assert simulated == pytest.approx(measured[m][1], rel=0.1)
