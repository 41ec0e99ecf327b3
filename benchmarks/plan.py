"""What neox.plan.time predicts for a training step on this machine, against a real step's time.

One process, float32, the step of benchmarks/train.py. The rates are measured just before
(neox.plan.here), the prediction knows nothing of the step.

    python benchmarks/plan.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.train import FULL, QUICK, Shape, configuration, ours  # noqa: E402
from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

SHAPES = [
    FULL,
    Shape("160M", 12, 768, 12, 50304, sequence=512, batch=1, rounds=5, steps=1),
    Shape("small", 4, 256, 4, 8192, sequence=256, batch=8, rounds=9, steps=2),
]


def predicted(shape: Shape) -> float:
    """Seconds of one step."""
    from neox.plan.cluster import HERE, load_cluster
    from neox.plan.messages import work
    from neox.plan.stages import PlannedModel
    from neox.plan.time import step_time
    from neox.plan.trace import planned_world
    from neox.plan.traffic import shape_of

    config = configuration(shape)
    with planned_world():
        planned = work(PlannedModel(config, shape.vocab))
    step = step_time(planned, shape_of(config, shape.vocab), load_cluster(HERE))
    print(shape.name, {name: f"{seconds:.4f}" for name, seconds in step.parts.items() if seconds})
    return step.seconds


def measured(shape: Shape) -> float:
    """The quickest of some real steps, as the rates are those of the quickest rounds."""
    step = ours(shape)
    step()
    times = []
    for _ in range(shape.rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    log.quiet_third_parties()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    figures = {}
    shapes = [QUICK] if arguments.quick else SHAPES
    plans = [predicted(shape) for shape in shapes]  # before there is an engine
    for shape, plan in zip(shapes, plans, strict=True):
        real = measured(shape)
        figures[f"predicted_over_measured_{shape.name}"] = plan / real
        print(f"{shape.name:8}{plan:9.4f} s predicted{real:9.4f} s measured{plan / real:7.2f}")
    if arguments.json:
        write_text(arguments.json, json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
