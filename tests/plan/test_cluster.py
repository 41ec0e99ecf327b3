"""Cluster files, and times of messages by arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from neox.config import from_dict
from neox.errors import ConfigError
from neox.parallel.topology import Topology
from neox.plan.cluster import CALIBRATED, FOLDER, Cluster, Link, Reached, built_in, load_cluster
from neox.plan.time import message_seconds, run_cost, step_time
from neox.plan.traffic import COPY, SUM, Shape, shape_of
from neox.plan.work import Message, StageWork, Work
from tests.models import BASE

FILE = {
    "device": "X1",
    "memory_gb": 16,
    "peak_tflops": {"float32": 10, "bfloat16": 40},
    "memory_gb_per_s": 500,
    "devices_per_node": 4,
    "node": {"gb_per_s": 100, "latency_us": 2},
    "network": {"gb_per_s": 10},
    "price_per_device_hour": 1.5,
}


@pytest.mark.parametrize("name", sorted({*built_in()} - {"here"}))
def test_every_shipped_cluster_loads(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.name == name
    assert cluster.reached == CALIBRATED
    assert 0 < cluster.network.bandwidth < cluster.node.bandwidth < cluster.bandwidth
    assert (FOLDER / f"{name}.yml").exists()


def test_a_file_is_read_in_its_units(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump(FILE | {"reached": {"products": 0.5}}))
    cluster = load_cluster(path)
    assert (cluster.name, cluster.device, cluster.memory) == ("mine", "X1", 16e9)
    assert cluster.product_rate("bfloat16") == 20e12
    assert cluster.memory_rate == 500e9 * CALIBRATED.memory
    assert cluster.node == Link(100e9, 2e-6)
    assert cluster.network == Link(10e9, 0.0)
    assert cluster.price == 1.5
    with pytest.raises(ConfigError, match="no peak_tflops for float16, only for bfloat16, float32"):
        cluster.product_rate("float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gb": None}, "lacks memory_gb"),
        ({"memory_gb": "much"}, "memory_gb is 'much'; give a number above 0"),
        ({"memory_gb": -1}, "memory_gb is -1"),
        ({"memory_gb": float("nan")}, "memory_gb is nan"),
        ({"devices_per_node": 2.5}, "give a whole number"),
        ({"colour": "red"}, "has 'colour'; known are device"),
        ({"node": 5}, "node is 5; give keys: gb_per_s, latency_us"),
        ({"node": {"gb_per_s": 1, "hops": 2}}, "node has 'hops'"),
        ({"peak_tflops": {}}, "peak_tflops is empty"),
        ({"peak_tflops": {"int8": 3}}, "peak_tflops has 'int8'"),
        ({"reached": {"links": 1.5}}, "links is 1.5; a share is at most 1"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump(FILE | change))
    with pytest.raises(ConfigError, match=message):
        load_cluster(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a100-80g is no cluster file. Did you mean a100-80gb\?"):
        load_cluster("a100-80g")
    with pytest.raises(ConfigError, match="Known are a100-40gb"):
        load_cluster("zzz")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_cluster(tmp_path)
    (tmp_path / "a.yml").write_text("a: [")
    with pytest.raises(ConfigError, match="is no YAML"):
        load_cluster(tmp_path / "a.yml")
    (tmp_path / "b.yml").write_text("- 1")
    with pytest.raises(ConfigError, match="give keys"):
        load_cluster(tmp_path / "b.yml")


def cluster(**changes: object) -> Cluster:
    values: dict = {
        "name": "x",
        "device": "x",
        "memory": 1e9,
        "peak": {"float32": 1e12},
        "bandwidth": 1e11,
        "devices_per_node": 4,
        "node": Link(1e10, 1e-6),
        "network": Link(1e9, 1e-5),
        "reached": Reached(),
    }
    return Cluster(**values | changes)


@pytest.mark.parametrize(
    ("grid", "axis", "operation", "seconds"),
    [
        (Topology(tp=4), "tp", "all_reduce", 2 * 3 / 4 * 1e6 / 1e10 + 4e-6),
        (Topology(tp=1), "tp", "all_reduce", 0.0),
        # 8 ranks in two machines: four links of each carry the ring.
        (Topology(dp=8), "dp", "all_reduce", 2 * 7 / 8 * 1e6 / 4e9 + 6e-5),
        (Topology(tp=4, dp=2), "dp", "reduce_scatter", 1 / 2 * 1e6 / 1e9 + 1e-5),
        (Topology(tp=2, dp=2), "dp", "all_gather", 1 / 2 * 1e6 / 1e10 + 1e-6),
        (Topology(pp=2, dp=4), "pp", "send", 1e6 / 1e9 + 1e-5),
        (Topology(pp=2, dp=2), "pp", "send", 1e6 / 1e10 + 1e-6),
    ],
)
def test_messages_take_the_narrowest_link(
    grid: Topology, axis: str, operation: str, seconds: float
) -> None:
    message = Message(operation, axis, 1, 10**6)  # type: ignore[arg-type]
    assert message_seconds(message, grid, cluster()) == pytest.approx(seconds)


SHAPE = Shape(
    micro_batch=2,
    sequence=10,
    hidden=8,
    heads=2,
    ffn=32,
    vocab=100,
    tp=1,
    element_size=4,
    sums=SUM,
    copies=COPY,
)


def one_stage(messages: tuple[Message, ...] = (), dp: int = 1, micro_batches: int = 3) -> Work:
    stage = StageWork(2, 1e9, 2e9, 1e9, 10**8, messages)
    return Work(Topology(dp=dp), micro_batches, 60, "float32", False, (stage,))


def test_a_step_is_its_parts() -> None:
    """One stage: 3 x 4e9 FLOPs at 1e12, 1e8 bytes of the optimizer at 1e11."""
    step = step_time(one_stage(), SHAPE, cluster())
    assert step.parts["matrix products"] == pytest.approx(0.012)
    assert step.parts["optimizer"] == pytest.approx(0.001)
    per_token = 4 * 20 * (8 * (2 * 2 + 3) + 2 * 32 + 2 * 8)  # a layer's forward pass
    assert SHAPE.layer.forward == per_token
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    assert step.tokens_per_second == pytest.approx(60 / step.seconds)


def test_what_overlaps_is_hidden_behind_the_last_backward_pass() -> None:
    small, large = 10**6, 10**9
    cases = ((small, True, False), (large, True, True), (small, False, True))
    for size, overlaps, exposed in cases:
        message = Message("all_reduce", "dp", 1, size, overlaps)
        step = step_time(one_stage((message,), dp=8), SHAPE, cluster())
        assert (step.parts["data-parallel messages"] > 0) == exposed


def test_a_description_is_part_of_a_send() -> None:
    """Of two stages on two machines: a tensor each way, with its description."""
    grid = Topology(pp=2)
    stage = one_stage().stages[0]
    sends = (Message("send", "pp", 3, 3 * 10**6), Message("send", "pp", 3, 3 * 72))
    work = Work(grid, 3, 60, "float32", True, (replace(stage, messages=sends),) * 2)
    step = step_time(work, SHAPE, cluster(devices_per_node=1))
    each = 1e6 / 1e9 + 72 / 1e9 + 2e-5  # both have a latency
    assert step.parts["pipeline messages"] == pytest.approx(3 * 2 * each)


def test_sequence_parallel_ranks_share_the_residual_stream_only() -> None:
    values = {**BASE, "model_parallel_size": 2, "hidden_size": 64}
    for parallel, sums in ((True, 1.5), (False, 1.0)):
        given = values | {"gpt_j_residual": parallel, "sequence_parallel": True}
        split = shape_of(from_dict(given, world_size=2), 64)
        assert split.sums == SUM.times(sums)
        assert split.norms == 2
    assert shape_of(from_dict(values, world_size=2), 64).sums == SUM.times(2)


def test_ranks_share_a_machine() -> None:
    shared = cluster(shared=True, devices_per_node=1)
    part = shared.for_ranks(4)
    assert (part.peak["float32"], part.bandwidth, part.memory) == (2.5e11, 2.5e10, 2.5e8)
    assert part.devices_per_node == 4
    assert cluster().for_ranks(4) == cluster()


def test_a_run_costs_its_device_hours() -> None:
    cost = run_cost(2.0, 43200, 8, 1.5)
    assert (cost.days, cost.device_hours, cost.price) == (1.0, 192.0, 288.0)
    assert run_cost(2.0, 43200, 8, None).price is None


def test_this_machine_is_measured() -> None:
    here = load_cluster("here")
    assert here.shared
    assert here.reached == Reached()
    assert 1e8 < here.bandwidth < 1e13
    assert 1e8 < here.product_rate("float32") < 1e15
