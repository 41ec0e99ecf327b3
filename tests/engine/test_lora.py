"""Adapters trained at every grid, on 8-bit weights too, are the same adapters; runs go on."""

from __future__ import annotations

import ctypes
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.peft import read_adapters
from neox.checkpoint.sources import AdapterFiles
from neox.config import NeoXConfig
from neox.data.loaders import Batch
from neox.engine.build import build_engine
from neox.engine.deepspeed import DeepSpeedEngine
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.engine.test_grids import (
    NO_PIPELINE,
    OPTIMIZER,
    RECOMPUTE,
    SPLIT,
    ZERO_1,
    ZERO_2,
    batches,
)
from tests.models import VOCAB, config_of, tokens, write_model
from tests.world import World, forget_groups

Values = dict[str, Any]
STEPS = 4
LORA = {"rank": 4, "alpha": 8, "targets": ["all-linear", "final_linear"]}
EIGHT_BIT = {"load_in_8bit": True}
BIASES = {"lora": {**LORA, "biases": True, "norms": True}}


class Outcome(NamedTuple):
    losses: list[float]
    norms: list[float | None]
    validation: float


def make(topology: Topology, values: Values, base: str) -> tuple[NeoXConfig, ProcessGroups]:
    config = config_of(
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        load=base,
        **{"pipe_parallel_size": topology.pp, "optimizer": OPTIMIZER, "lora": LORA, **values},
        train_micro_batch_size_per_gpu=4 // topology.dp,
    )
    return config, initialize(topology, "gloo", torch.device("cpu"))


def build(config: NeoXConfig, groups: ProcessGroups, own: Path | None = None) -> DeepSpeedEngine:
    assert config.load is not None
    adapters = read_adapters(own, config, VOCAB) if own else None
    engine = build_engine(config, groups, VOCAB, Checkpoint.open(Path(config.load)), adapters)
    assert isinstance(engine, DeepSpeedEngine)
    return engine


def save(engine: DeepSpeedEngine, folder: Path) -> None:
    if engine.groups.rank == 0:
        folder.mkdir(parents=True)
    engine.groups.barrier()
    engine.save(folder, {"iteration": STEPS})
    engine.groups.barrier()


def train(rank: int, cases: list[tuple[Topology, Values]], base: str, out: str) -> list[Outcome]:
    outcomes = []
    for number, (topology, values) in enumerate(cases):
        config, groups = make(topology, values, base)
        engine = build(config, groups)
        source = batches(config, groups)
        steps = [engine.train_batch(source, i, 0.01) for i in range(1, STEPS + 1)]
        validation = engine.eval_batch(source)
        save(engine, Path(out) / f"global_step{number}")
        outcomes.append(Outcome([s.loss for s in steps], [s.grad_norm for s in steps], validation))
        forget_groups()
    return outcomes


def adapters(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def compare(world: World, tmp_path: Path, cases: list[tuple[Topology, Values]], ranks: int) -> None:
    """The cases, of `ranks` processes each, with the same in one process."""
    base = str(write_model(tmp_path / "base", 3))
    singles: dict[str, tuple[Outcome, dict[str, Tensor]]] = {}
    found = world.run(ranks, train, cases, base, str(tmp_path / "cut"))[0]
    for number, (_, values) in enumerate(cases):
        alone = {key: values[key] for key in ("load_in_8bit", "lora") if key in values}
        key = json.dumps(alone)
        if key not in singles:
            place = tmp_path / f"whole{len(singles)}"
            (outcome,) = world.run(1, train, [(Topology(), alone)], base, str(place))[0]
            singles[key] = outcome, adapters(place / "global_step0")
        expected, weights = singles[key]
        assert_close(found[number].losses, expected.losses, rtol=1e-5, atol=1e-5)
        assert_close(found[number].norms, expected.norms, rtol=1e-4, atol=1e-5)
        assert_close(found[number].validation, expected.validation, rtol=1e-5, atol=1e-5)
        trained = adapters(tmp_path / "cut" / f"global_step{number}")
        assert trained.keys() == weights.keys()
        for name, tensor in trained.items():
            assert_close(tensor, weights[name], rtol=1e-4, atol=2e-5, msg=f"{number}: {name}")


def test_two_processes_train_what_one_does(world: World, tmp_path: Path) -> None:
    cases = [
        (Topology(tp=2), EIGHT_BIT),
        (Topology(tp=2), NO_PIPELINE | RECOMPUTE | BIASES),
        (Topology(tp=2), SPLIT | EIGHT_BIT | BIASES),
        (Topology(pp=2), EIGHT_BIT | RECOMPUTE),
        (Topology(pp=2), ZERO_1 | BIASES),
        (Topology(dp=2), NO_PIPELINE | EIGHT_BIT),
        (Topology(dp=2), ZERO_2 | EIGHT_BIT),
        (Topology(dp=2), ZERO_1),
    ]
    compare(world, tmp_path, cases, 2)


def test_four_processes_train_what_one_does(world: World, tmp_path: Path) -> None:
    cases = [
        (Topology(tp=2, pp=2), ZERO_1 | EIGHT_BIT | RECOMPUTE),
        (Topology(tp=2, dp=2), NO_PIPELINE | SPLIT | EIGHT_BIT),
    ]
    compare(world, tmp_path, cases, 4)


def resume(rank: int, topology: Topology, values: Values, base: str, out: str) -> None:
    """Two steps, a checkpoint, two more; then those again, and at another ZeRO stage."""
    config, groups = make(topology, values, base)
    engine = build(config, groups)
    source = batches(config, groups)
    for iteration in (1, 2):
        engine.train_batch(source, iteration, 0.01)
    folder = Path(out) / "global_step2"
    save(engine, folder)
    uninterrupted = [engine.train_batch(source, iteration, 0.01).loss for iteration in (3, 4)]

    resumed = build(config, groups, folder)
    resumed.load_optimizer(_own(folder, topology.tp), Path(out))
    source = batches(config, groups)
    for _ in range(2 * config.gradient_accumulation_steps):
        next(source)
    assert [resumed.train_batch(source, i, 0.01).loss for i in (3, 4)] == uninterrupted


def _own(folder: Path, tp: int) -> Checkpoint:
    return Checkpoint(folder, AdapterFiles(folder, tp))


def go_on(rank: int, topology: Topology, base: str, folder: str, saved_tp: int) -> list[float]:
    """Steps 3 and 4 at this grid."""
    values = BIASES | EIGHT_BIT | (NO_PIPELINE if topology.pp == 1 else {})
    config, groups = make(topology, values, base)
    engine = build(config, groups, Path(folder))
    engine.load_optimizer(_own(Path(folder), saved_tp), Path(folder).parent)
    source = batches(config, groups)
    for _ in range(2 * config.gradient_accumulation_steps):
        next(source)
    return [engine.train_batch(source, i, 0.01).loss for i in (3, 4)]


def test_a_run_goes_on_at_another_grid(world: World, tmp_path: Path) -> None:
    base = str(write_model(tmp_path / "base", 3))
    topology = Topology(tp=2)
    world.run(2, resume, topology, ZERO_1 | BIASES | EIGHT_BIT, base, str(tmp_path / "own"))
    folder = str(tmp_path / "own/global_step2")
    expected = world.run(2, go_on, topology, base, folder, 2)[0]
    for other in (Topology(), Topology(pp=2), Topology(dp=2)):
        found = world.run(other.world_size, go_on, other, base, folder, 2)[0]
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Of malloc.h: from how many bytes on memory is the system's and not the heap's, and how often.
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4


def step_with_peak(rank: int, base: str, values: Values) -> tuple[float, int]:
    """Loss of the second step, and by how many bytes memory rose in the two at most."""
    config, groups = make(Topology(), NO_PIPELINE | values, base)
    engine = build(config, groups)
    text = tokens(batch=64, length=17)
    source = itertools.repeat(Batch(text[:, :-1], text[:, 1:], torch.ones(64, 16)))
    # What is freed goes back at once, else the peak counts the heap's holes as well.
    libc = ctypes.CDLL(None)
    assert libc.mallopt(M_MMAP_MAX, 1 << 16) and libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmHWM")
    engine.train_batch(source, 1, 0.01)
    loss = engine.train_batch(source, 2, 0.01).loss
    return loss, _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def test_recomputation_changes_no_loss_and_takes_less_memory(world: World, tmp_path: Path) -> None:
    shape = {"num_layers": 8, "intermediate_size": 4096}
    base = str(write_model(tmp_path / "base", 3, **shape))
    values = shape | EIGHT_BIT | {"gradient_accumulation_steps": 1}
    ((loss, kept),) = world.run(1, step_with_peak, base, values)
    again = values | {"checkpoint_activations": True}
    ((same, recomputed),) = world.run(1, step_with_peak, base, again)
    assert abs(loss - same) <= 1e-6
    # Of 7 layers more, GELU's input: 1024 positions x 4096 x 4 bytes = 16 MiB each.
    assert kept - recomputed > 7 * 16 << 20


def test_a_resumed_run_is_the_uninterrupted_one(world: World, tmp_path: Path) -> None:
    base = str(write_model(tmp_path / "base", 3))
    dropout = {"lora": {**LORA, "dropout": 0.2}, "load_in_8bit": True}
    eight_bit_adam = {"use_bnb_optimizer": True, "optimizer": {"type": "Adam", "params": {"lr": 1}}}
    cases = [
        (Topology(), NO_PIPELINE | dropout | eight_bit_adam),
        (Topology(tp=2), dropout),
        (Topology(pp=2), ZERO_1 | BIASES | EIGHT_BIT),
        (Topology(dp=2), {"precision": "bfloat16"} | EIGHT_BIT),
    ]
    for number, (topology, values) in enumerate(cases):
        world.run(topology.world_size, resume, topology, values, base, str(tmp_path / str(number)))
