"""The lines a training run prints, in NeoX's own format, so that scripts which read it still do."""

from __future__ import annotations

from collections.abc import Mapping

FLOPS_UNITS = ("", "KFLOPS", "MFLOPS", "GFLOPS", "TFLOPS", "PFLOPS", "EFLOPS", "ZFLOPS")


def training_line(
    *,
    iteration: int,
    train_iters: int,
    samples_per_second: float,
    seconds_per_iteration: float,
    learning_rate: float,
    flops_per_second: float,
    utilization: tuple[float, float] | None,
    losses: Mapping[str, float],
    loss_scale: float | None,
    skipped: int,
    nan: int,
) -> str:
    """The line of one log interval.

    `flops_per_second` is per device; `utilization` is (MFU, HFU) in percent, when the peak rate is
    known; `losses` are means over the interval; `loss_scale` is None without fp16; `skipped` and
    `nan` count the interval's iterations.
    """
    fields = [
        f"samples/sec: {samples_per_second:.3f}",
        f"iteration {iteration:8d}/{train_iters:8d}",
        f"elapsed time per iteration (ms): {seconds_per_iteration * 1000:.1f}",
        f"learning rate: {learning_rate:.3E}",
        f"approx flops per GPU: {human_flops(flops_per_second)}",
    ]
    if utilization is not None:
        mfu, hfu = utilization
        fields += [f"MFU: {mfu:.2f}%", f"HFU: {hfu:.2f}%"]
    fields += [f"{name}: {value:.6E}" for name, value in losses.items()]
    if loss_scale is not None:
        fields.append(f"loss scale: {loss_scale:.1f}")
    fields.append(f"number of skipped iterations: {skipped:3d}")
    fields.append(f"number of nan iterations: {nan:3d}")
    return "".join(f" {field} |" for field in fields)


def timers_line(seconds: Mapping[str, float]) -> str:
    """The parts of a step, `time (ms) | forward: 12.34 | ...`."""
    fields = [f"{name}: {value * 1000:.2f}" for name, value in seconds.items()]
    return " | ".join(["time (ms)", *fields])


def memory_line(iteration: int, megabytes: Mapping[str, float]) -> str:
    """`after 10 iterations memory (MB) | allocated: ... | ...`, once in a run."""
    fields = [f"{name}: {value:.1f}" for name, value in megabytes.items()]
    return " | ".join([f"after {iteration} iterations memory (MB)", *fields])


def evaluation_box(chart: str, at: str, metrics: Mapping[str, float]) -> str:
    """Three lines, the middle one like ` validation results at iteration 10 | lm_loss ...`."""
    values = "".join(f"{name} value: {value:.6E} | " for name, value in metrics.items())
    line = f" {chart} results at {at} | {values}"
    rule = "-" * (len(line) + 1)
    return f"{rule}\n{line}\n{rule}"


def human_flops(flops_per_second: float) -> str:
    """One decimal and a unit: 9.8e9 -> "9.8GFLOPS"."""
    scaled = flops_per_second
    for unit in FLOPS_UNITS[:-1]:
        if scaled < 1000:
            return f"{scaled:.1f}{unit}"
        scaled /= 1000
    return f"{scaled:.1f}{FLOPS_UNITS[-1]}"


def human_seconds(seconds: float) -> str:
    """A length of time in its largest unit: 7s, 12m, 3h, 2d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
