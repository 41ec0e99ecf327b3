"""Runs that others published against what neox.plan.time predicts for them; and the fit.

The three shares of the hardware's rates in neox.plan.cluster.CALIBRATED are fitted to the rows of
published_runs.yml that say `use: fit`; the others check them.

    python benchmarks/published_runs.py             # the table
    python benchmarks/published_runs.py --fit       # fit anew, and the table with that
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from neox.atomic import write_text  # noqa: E402
from neox.parallel.topology import Topology  # noqa: E402
from neox.plan.cluster import CALIBRATED, Cluster, Reached, load_cluster  # noqa: E402
from neox.plan.time import StepTime, step_time  # noqa: E402
from neox.plan.traffic import BIAS, COPY, DROPOUT, NORM, ROTATION, SPLIT, SUM, Passes, Shape  # noqa: E402
from neox.plan.work import Message, StageWork, Work  # noqa: E402

ROWS = Path(__file__).with_suffix(".yml")
SEQUENCE, VOCAB, HALF, TERA = 2048, 51200, 2, 1e12
TOLERANCE = 0.15
# Of each parameter Adam reads the gradient in half and writes it in single precision, reads that
# and reads and writes weight and two moments in single precision, and writes the weight in half.
OPTIMIZER_BYTES = 2 + 4 + 4 + 6 * 4 + 2


@dataclass(frozen=True)
class Row:
    """A published run. `tflops` is per GPU, by `formula`."""

    source: str
    cluster: str
    name: str
    hidden: int
    heads: int
    layers: int
    tp: int
    pp: int
    gpus: int
    batch: int
    micro_batch: int
    tflops: float
    use: str  # fit or check
    chunks: int = 1
    formula: str = "megatron"

    @property
    def is_neox(self) -> bool:
        return self.source == "gpt_neox"

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp)

    @property
    def tokens(self) -> int:
        return self.batch * SEQUENCE

    @property
    def parameters(self) -> float:
        """Equation 2 of arXiv:2104.04473; GPT-NeoX-20B's are two embeddings and no positions."""
        h, n = self.hidden, self.layers
        embeddings = 2 * VOCAB * h if self.is_neox else (VOCAB + SEQUENCE) * h
        return 12 * n * h**2 * (1 + 13 / (12 * h)) + embeddings

    @property
    def flops(self) -> float:
        """FLOPs of a step on all GPUs, as the publication counts them."""
        h, n, s = self.hidden, self.layers, SEQUENCE
        if self.formula == "gpt-neox":
            return self.tokens * (6 * self.parameters + 60 * n * h * s)
        return 96 * self.tokens * n * h**2 * (1 + s / (6 * h) + VOCAB / (16 * n * h))

    @property
    def seconds(self) -> float:
        """Of a step, as published."""
        return self.flops / (self.gpus * self.tflops * TERA)


def read_rows() -> list[Row]:
    sources = yaml.safe_load(ROWS.read_text())
    return [
        Row(source=source, cluster=content["cluster"], **row)
        for source, content in sources.items()
        for row in content["rows"]
    ]


def shape_of(row: Row) -> Shape:
    """Both wrote attention's scores to memory, added the bias of query, key and value to their
    product afterwards, as torch did with three dimensions, and copied the context.

    Megatron-LM has one kernel for bias, dropout and residual sum: it reads two tensors and a mask
    of half a pass and writes one. GPT-NeoX-20B's biases, branches and residual are added one by
    one, without dropout; a quarter of query and key is rotated and joined to the rest again, whose
    backward pass fills, copies and adds the four parts (14 passes). See megatron/model/
    transformer.py of GPT-NeoX early in 2022. Its norm is torch's, then of two kernels forward and
    of three backward; Megatron-LM's is one and two.
    """
    around = BIAS.plus(SPLIT).times(3).plus(COPY)
    norm = NORM
    if row.is_neox:
        sums = BIAS.plus(SUM).times(2)
        around = around.plus(ROTATION.times(2 * 0.25)).plus(Passes(4, 14))
        norm = Passes(3, 7)
    else:
        sums = Passes(SUM.forward + 0.5, DROPOUT.backward + BIAS.backward + SUM.backward).times(2)
    return Shape(
        micro_batch=row.micro_batch,
        sequence=SEQUENCE,
        hidden=row.hidden,
        heads=row.heads,
        ffn=4 * row.hidden,
        vocab=VOCAB,
        tp=row.tp,
        element_size=HALF,
        sums=sums,
        copies=around,
        norm=norm,
        attention_dropout=not row.is_neox,
        scores_in_memory=True,
    )


def work_of(row: Row) -> Work:
    """What each GPU computes and sends, by the arithmetic of arXiv:2104.04473."""
    micro_batches = row.batch // (row.micro_batch * row.dp)
    tokens, h = row.micro_batch * SEQUENCE, row.hidden
    layers = row.layers // row.pp
    layer = 24 * tokens * h**2 * (1 + SEQUENCE / (6 * h)) / row.tp
    head = 2 * tokens * h * VOCAB / row.tp
    parameters = row.parameters / (row.tp * row.pp)
    activation = HALF * tokens * h  # bytes
    # GPT-NeoX sums a parallel layer's two branches first, but not their inputs' gradients.
    sums = 4 if row.is_neox else 6  # of forward, backward and recomputation
    calls = micro_batches * layers * sums
    sends = micro_batches * row.chunks  # and as many gradients back
    # A tp rank sends its part of an activation, and gathers the others'. Megatron-LM does the same
    # with gradients; DeepSpeed 0.3 sent them whole (is_grad_partitioned in its pipeline's engine).
    back = 1 if row.is_neox else row.tp
    messages: tuple[Message, ...] = (
        Message("all_reduce", "tp", calls, calls * activation),
        Message("all_reduce", "dp", 1, int(HALF * parameters), overlaps=row.pp == 1),
    )
    if row.pp > 1:
        gathers = sends * (1 if row.is_neox else 2)
        messages += (
            Message("send", "pp", sends, sends * activation // row.tp),
            Message("send", "pp", sends, sends * activation // back),
            Message("all_gather", "tp", gathers, gathers * activation),
        )
    optimizer = OPTIMIZER_BYTES * parameters
    if row.is_neox:  # ZeRO 1: each replica a part, then all of the weights
        optimizer /= row.dp
        messages += (Message("all_gather", "dp", 1, int(HALF * parameters)),)
    stages = tuple(
        StageWork(
            layers=layers,
            forward_flops=layers * layer + head * (stage == row.pp - 1),
            backward_flops=2 * (layers * layer + head * (stage == row.pp - 1)),
            recompute_flops=layers * layer,
            optimizer_bytes=int(optimizer),
            messages=messages,
        )
        for stage in range(row.pp)
    )
    grid = Topology(row.pp, row.dp, row.tp)
    return Work(grid, micro_batches, row.tokens, "float16", row.is_neox, stages)


def predict(row: Row, cluster: Cluster) -> StepTime:
    return step_time(work_of(row), shape_of(row), cluster, chunks=row.chunks)


def with_rates(row: Row, reached: Reached) -> Cluster:
    return replace(load_cluster(row.cluster), reached=reached)


def fit(rows: list[Row]) -> Reached:
    """The shares, each at most 1, whose predictions come nearest to the rows marked for it.

    Least squares of the logarithms of predicted over published seconds; about 10 s.
    """
    from scipy.optimize import least_squares

    chosen = [row for row in rows if row.use == "fit"]

    def errors(shares: list[float]) -> list[float]:
        reached = Reached(*shares)
        return [math.log(predict(r, with_rates(r, reached)).seconds / r.seconds) for r in chosen]

    found = least_squares(errors, [0.8, 0.8, 0.8], bounds=([0.1] * 3, [1.0] * 3))
    return Reached(*(round(float(share), 3) for share in found.x))


def error(row: Row, reached: Reached = CALIBRATED) -> float:
    """Predicted over published throughput, less 1."""
    return row.seconds / predict(row, with_rates(row, reached)).seconds - 1


def print_table(rows: list[Row], reached: Reached) -> None:
    print(f"{'':16}{'used':>6}{'GPUs':>6}{'published':>11}{'predicted':>11}{'error':>8}{'step':>9}")
    for row in rows:
        step = predict(row, with_rates(row, reached))
        predicted = row.tflops * row.seconds / step.seconds
        print(
            f"{row.name:16}{row.use:>6}{row.gpus:6}{row.tflops:11.0f}{predicted:11.1f}"
            f"{error(row, reached):+8.1%}{step.seconds:7.1f} s"
        )
    checked = [abs(error(row, reached)) for row in rows if row.use == "check"]
    print(f"largest error of the {len(checked)} that are checked: {max(checked):.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="fit the shares anew first")
    parser.add_argument("--quick", action="store_true", help="changes nothing: it is quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    rows = read_rows()
    reached = fit(rows) if arguments.fit else CALIBRATED
    print(
        f"shares of the peak: products {reached.products}, memory {reached.memory}, "
        f"links {reached.links}"
    )
    print_table(rows, reached)
    if arguments.json:
        figures = {f"error_{row.name}": error(row, reached) for row in rows if row.use == "check"}
        write_text(arguments.json, json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
