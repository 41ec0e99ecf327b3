"""Optimizer state saved at one grid goes on at any other as if nothing had happened."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.optimizer_files import optimizer_files
from neox.config import NeoXConfig
from neox.engine.base import Engine
from neox.engine.build import build_engine
from neox.engine.deepspeed import DeepSpeedEngine
from neox.engine.plain_state import NUMBERED, PlainState
from neox.engine.saved_state import ZeroState
from neox.errors import CheckpointError
from neox.model.gpt import layers as model_layers
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.engine.test_grids import OPTIMIZER, batches
from tests.models import ARCHITECTURES, VOCAB, config_of
from tests.world import World

BEFORE = 3  # steps that the first run takes before it saves
NO_PIPELINE = {"pipe_parallel_size": 0}
ZERO_0 = {"zero_optimization": {"stage": 0}}
ZERO_1 = {"zero_optimization": {"stage": 1}}


def engine_of(
    topology: Topology,
    values: dict[str, Any],
    checkpoint: Checkpoint | None = None,
    rows: int = VOCAB,
) -> tuple[DeepSpeedEngine, NeoXConfig, ProcessGroups]:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    settings = {"pipe_parallel_size": topology.pp, "optimizer": OPTIMIZER, **ZERO_1, **values}
    config = config_of(
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        train_micro_batch_size_per_gpu=4 // topology.dp,
        **settings,
    )
    engine = build_engine(config, groups, rows, checkpoint)
    assert isinstance(engine, DeepSpeedEngine)
    return engine, config, groups


def save(engine: Engine, folder: Path, groups: ProcessGroups) -> None:
    if groups.rank == 0:
        folder.mkdir()
    groups.barrier()
    engine.save(folder, {"iteration": BEFORE})


def start(
    rank: int, topology: Topology, values: dict[str, Any], folder: str, steps: int
) -> list[float]:
    """Train, save, and go on for `steps`: the losses from there."""
    engine, config, groups = engine_of(topology, values)
    source = batches(config, groups)
    for iteration in range(1, BEFORE + 1):
        engine.train_batch(source, iteration, 0.01)
    save(engine, Path(folder), groups)
    return [engine.train_batch(source, BEFORE + i, 0.01).loss for i in range(1, steps + 1)]


def go_on(
    rank: int, topology: Topology, values: dict[str, Any], folder: str, again: str, steps: int
) -> list[float]:
    """Resume, save at once into `again`, and go on for `steps`."""
    checkpoint = Checkpoint.open(Path(folder))
    engine, config, groups = engine_of(topology, values, checkpoint)
    assert engine.load_optimizer(checkpoint, Path(folder).parent)["iteration"] == BEFORE
    save(engine, Path(again), groups)
    source = batches(config, groups)
    for _ in range(BEFORE * config.gradient_accumulation_steps):
        next(source)
    return [engine.train_batch(source, BEFORE + i, 0.01).loss for i in range(1, steps + 1)]


def whole_state(folder: Path, values: dict[str, Any], rows: int = VOCAB) -> dict[str, Tensor]:
    """Every parameter's whole state by layer, name and kind."""
    single = ProcessGroups.single()
    layers = model_layers(config_of(**values), rows, torch.float32, single)
    checkpoint = Checkpoint.open(folder)
    files = optimizer_files(folder, checkpoint.tp)
    saved = ZeroState(folder, files, layers) if files else PlainState(checkpoint)
    found = {}
    for layer in layers:
        if layer.has_file:
            assert layer.layout is not None
            weights = checkpoint.read(layer, single)
            for name, layout in layer.layout.items():
                state = saved.of((layer.index, name), layout)
                for kind, tensor in ({"fp32": weights[name]} | state.whole(layout)).items():
                    found[f"{layer.index}.{name}.{kind}"] = tensor
                found[f"{layer.index}.{name}.step"] = torch.tensor(state.step or 0.0)
    return found


def check(
    world: World,
    tmp_path: Path,
    values: dict[str, Any],
    source: tuple[Topology, dict[str, Any]],
    targets: list[tuple[Topology, dict[str, Any]]],
    steps: int = 3,
    abs: float = 1e-5,
) -> dict[str, Tensor]:
    topology, own = source
    folder = tmp_path / f"global_step{BEFORE}"
    losses = world.run(topology.world_size, start, topology, {**values, **own}, str(folder), steps)[
        0
    ]
    before = whole_state(folder, values)
    for number, (topology, own) in enumerate(targets):
        again = tmp_path / f"again{number}"
        arguments = (topology, {**values, **own}, str(folder), str(again), steps)
        got = world.run(topology.world_size, go_on, *arguments)[0]
        assert got == pytest.approx(losses, abs=abs), topology
        after = whole_state(again, values)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), (topology, name)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {folder.name} | {f"again{number}" for number in range(len(targets))}
    return before


def test_every_grid_of_four_ranks_and_one_rank(world: World, tmp_path: Path) -> None:
    grids = [Topology(), Topology(pp=4), Topology(tp=4), Topology(tp=2, dp=2), Topology(pp=2, dp=2)]
    state = check(
        world,
        tmp_path,
        {"num_layers": 4},
        (Topology(tp=2, pp=2), {}),
        [(topology, zero) for topology, zero in zip(grids, cycle((ZERO_1, ZERO_0)), strict=False)],
        steps=20,
    )
    assert {name.rpartition(".")[2] for name in state} == {"fp32", "exp_avg", "exp_avg_sq", "step"}
    assert all(tensor == BEFORE for name, tensor in state.items() if name.endswith(".step"))
    moments = [tensor for name, tensor in state.items() if name.endswith(".exp_avg_sq")]
    assert all(moment.any() for moment in moments)


def scaled(engine: DeepSpeedEngine, scale: float) -> None:
    """Give the engine float16's loss scale, which a CPU's DeepSpeed lacks."""
    engine.inner.optimizer.loss_scaler = DynamicLossScaler(scale, 1000, 1, 2, False)
    engine.inner.optimizer.dynamic_loss_scale = True


def save_with_a_loss_scale(rank: int, folder: str, scale: float | None) -> None:
    engine, config, groups = engine_of(Topology(), {})
    engine.train_batch(batches(config, groups), 1, 0.01)
    if scale is not None:
        scaled(engine, scale)
    save(engine, Path(folder), groups)


def go_on_with_a_loss_scale(rank: int, folder: str, elsewhere: bool) -> float:
    checkpoint = Checkpoint.open(Path(folder))
    engine, *_ = engine_of(Topology(), {}, checkpoint)
    scaled(engine, 4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.inner, "fp16_enabled", lambda: True)
        patch.setattr(engine, "_saved_the_same", lambda _: not elsewhere)
        engine.load_optimizer(checkpoint, Path(folder).parent)
    return engine.inner.optimizer.loss_scale


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("saved", "expected"), [(512, 512), (None, 4096)])
def test_float16s_loss_scale_goes_on_but_not_that_of_another_precision(
    world: World, tmp_path: Path, saved: float | None, expected: float, elsewhere: bool
) -> None:
    folder = str(tmp_path / f"global_step{BEFORE}")
    world.run(1, save_with_a_loss_scale, folder, saved)
    assert world.run(1, go_on_with_a_loss_scale, folder, elsewhere) == [expected]


SGD = {"type": "SGD", "params": {"lr": 0.01}}
HEAVY_BALL = {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}
LION = {"type": "Lion", "params": {"lr": 0.01}}
MADGRAD = {"type": "madgrad_wd", "params": {"lr": 0.01}}
TP2PP2, DP2, ONE = Topology(tp=2, pp=2), Topology(dp=2), Topology()


@pytest.mark.parametrize(
    ("values", "source", "targets"),
    [
        # Grouped queries and a gated MLP: fused blocks of different widths. A sequential residual.
        (ARCHITECTURES["llama"], (TP2PP2, {}), [(ONE, {}), (DP2, {})]),
        (
            {"num_kv_heads": 2, "activation": "geglu", "intermediate_size": 96},
            (DP2, {}),
            [(TP2PP2, {}), (Topology(tp=2), NO_PIPELINE)],
        ),
        # A bias over the vocabulary.
        (
            ARCHITECTURES["gpt_j"],
            (TP2PP2, {}),
            [(ONE, {}), (Topology(tp=2), NO_PIPELINE | ZERO_0)],
        ),
        # Two stages hold the tied embedding, with the positions in it.
        (
            {"no_weight_tying": False, "pos_emb": "learned"},
            (TP2PP2, {}),
            [(Topology(tp=2), NO_PIPELINE), (Topology(pp=2, dp=2), {}), (TP2PP2, ZERO_0)],
        ),
        (
            {"no_weight_tying": False, "pos_emb": "learned"},
            (TP2PP2, ZERO_0),
            [(Topology(tp=2), NO_PIPELINE | ZERO_0), (Topology(pp=2, dp=2), {}), (ONE, ZERO_0)],
        ),
        (
            {"no_weight_tying": False},
            (Topology(tp=2), NO_PIPELINE),
            [(TP2PP2, {}), (DP2, {**NO_PIPELINE, "zero_optimization": {"stage": 2}})],
        ),
        (
            {"gpt_j_residual": False},
            (DP2, {**NO_PIPELINE, "zero_optimization": {"stage": 2}}),
            [(Topology(tp=4), {}), (ONE, {})],
        ),
        ({"optimizer": HEAVY_BALL}, (Topology(tp=2, dp=2), {}), [(Topology(pp=2), {})]),
        ({"optimizer": HEAVY_BALL}, (DP2, ZERO_0), [(Topology(pp=2), ZERO_0)]),
        ({"optimizer": SGD}, (TP2PP2, {}), [(DP2, {}), (ONE, ZERO_0)]),
        ({"optimizer": SGD}, (TP2PP2, ZERO_0), [(DP2, {})]),
        ({"optimizer": LION}, (Topology(tp=2, dp=2), {}), [(Topology(pp=2), {}), (DP2, ZERO_0)]),
        ({"optimizer": MADGRAD}, (DP2, ZERO_0), [(Topology(tp=2, pp=2), {}), (ONE, ZERO_0)]),
        ({"optimizer": MADGRAD}, (TP2PP2, {}), [(DP2, {}), (Topology(tp=2), ZERO_0)]),
        # The same grid with the layers divided otherwise: a large embedding has a stage's half.
        (
            {"num_layers": 4, "pos_emb": "learned", "max_position_embeddings": 1024},
            (Topology(pp=2), {"pipe_partition_method": "parameters"}),
            [(Topology(pp=2), {"pipe_partition_method": "uniform"})],
        ),
    ],
    ids=[
        *(
            "llama",
            "geglu",
            "gpt_j",
            "tied",
            "tied_zero0",
            "tied0",
            "zero2",
            "momentum",
            "momentum_zero0",
        ),
        *("sgd", "sgd_zero0", "lion", "madgrad_zero0", "madgrad", "partition"),
    ],
)
def test_every_layout_engine_and_optimizer(
    world: World,
    tmp_path: Path,
    values: dict[str, Any],
    source: tuple[Topology, dict[str, Any]],
    targets: list[tuple[Topology, dict[str, Any]]],
) -> None:
    check(world, tmp_path, values, source, targets)


@pytest.mark.parametrize(
    ("values", "topology"),
    [
        ({"no_weight_tying": False, "pos_emb": "learned"}, Topology(pp=2)),
        ({"no_weight_tying": False, "num_layers": 4}, Topology(pp=4)),
        ({"no_weight_tying": False}, Topology(tp=2)),
        ({"weight_decay": 0.0}, TP2PP2),
    ],
    ids=["tied", "tied_on_four", "tied_on_one", "untied"],
)
def test_numbers_alone_tell_the_parameters_where_the_order_is_upstreams(
    world: World, tmp_path: Path, values: dict[str, Any], topology: Topology
) -> None:
    """Upstream's files don't say which parameter has which number; ours are in its order."""
    folder = tmp_path / f"global_step{BEFORE}"
    arguments = (topology, values | ZERO_0, str(folder), 0)
    world.run(topology.world_size, start, *arguments)
    told = whole_state(folder, values)
    for path in folder.glob("mp_rank_*"):
        contents = torch.load(path, weights_only=True)
        groups = contents["optimizer"]["param_groups"]
        assert len(contents.pop(NUMBERED)) == sum(len(group["params"]) for group in groups)
        torch.save(contents, path)
    found = whole_state(folder, values)
    assert found.keys() == told.keys()
    for name, tensor in told.items():
        assert torch.equal(found[name], tensor), name


def test_a_stage_whose_file_is_missing_is_not_taken_for_untrained(
    world: World, tmp_path: Path
) -> None:
    folder = tmp_path / f"global_step{BEFORE}"
    world.run(2, start, Topology(pp=2), ZERO_0, str(folder), 0)
    (folder / "mp_rank_01_model_states.pt").unlink()
    arguments = (ONE, ZERO_0, str(folder), str(tmp_path / "again"), 0)
    with pytest.raises(CheckpointError, match=r"does not go with the weights.*no_load_optim"):
        world.run(1, go_on, *arguments)


def test_state_saved_before_the_first_step_is_none(world: World, tmp_path: Path) -> None:
    folder, again = tmp_path / f"global_step{BEFORE}", tmp_path / "again"
    world.run(1, save_untrained, str(folder))
    for topology, zero in ((ONE, ZERO_0), (DP2, ZERO_1)):
        arguments = (topology, zero, str(folder), str(again), 1)
        (loss, *_) = world.run(topology.world_size, go_on, *arguments)
        assert loss[0] > 0
        for path in again.iterdir():
            path.unlink()
        again.rmdir()


def save_untrained(rank: int, folder: str) -> None:
    engine, _, groups = engine_of(ONE, ZERO_0)
    save(engine, Path(folder), groups)


def test_bfloat16_keeps_its_float32_weights(world: World, tmp_path: Path) -> None:
    bf16 = {"precision": "bfloat16"}
    state = check(
        world,
        tmp_path,
        {},
        (TP2PP2, bf16),
        [
            (DP2, bf16),
            (Topology(tp=2), bf16 | NO_PIPELINE),
            (ONE, {"precision": "fp32"}),
            (DP2, {"precision": "fp32", **ZERO_0}),
        ],
        abs=0.03,
    )
    masters = [tensor for name, tensor in state.items() if name.endswith(".fp32")]
    assert any((tensor != tensor.bfloat16()).any() for tensor in masters)


def resume(
    rank: int, topology: Topology, values: dict[str, Any], rows: int, folder: str, again: str
) -> tuple[float, dict[str, Any]]:
    """Resume and save at once; the clipping, and the settings of the optimizer's first group."""
    checkpoint = Checkpoint.open(Path(folder))
    engine, _, groups = engine_of(topology, values, checkpoint, rows)
    engine.load_optimizer(checkpoint, Path(folder).parent)
    save(engine, Path(again), groups)
    optimizer = engine.inner.optimizer
    return optimizer.clip_grad, {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }


def test_rows_added_to_the_vocabulary_have_no_state(world: World, tmp_path: Path) -> None:
    folder, again = tmp_path / f"global_step{BEFORE}", tmp_path / "again"
    values = {"use_bias_in_final_linear": True}
    world.run(4, start, TP2PP2, values, str(folder), 0)
    world.run(2, resume, Topology(tp=2), values, VOCAB + 8, str(folder), str(again))
    before, after = whole_state(folder, values), whole_state(again, values, VOCAB + 8)
    grown = [name for name, tensor in after.items() if tensor.shape != before[name].shape]
    # Of the embedding, and of the head weight and bias: the numbers and Adam's two moments.
    assert len(grown) == 3 * 3
    for name in grown:
        assert not after[name][VOCAB:].any()
        after[name] = after[name][:VOCAB]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("topology", [DP2, ONE], ids=["same", "another"])
def test_settings_are_the_configurations(world: World, tmp_path: Path, topology: Topology) -> None:
    folder, again = tmp_path / f"global_step{BEFORE}", tmp_path / "again"
    world.run(2, start, DP2, {"weight_decay": 0.1, "gradient_clipping": 1.0}, str(folder), 0)
    params = {**OPTIMIZER["params"], "betas": [0.8, 0.9]}
    values = {
        "optimizer": {"type": "Adam", "params": params},
        "weight_decay": 0.2,
        "gradient_clipping": 0.5,
    }
    arguments = (topology, values, VOCAB, str(folder), str(again))
    clip_grad, settings = world.run(topology.world_size, resume, *arguments)[0]
    assert clip_grad == 0.5
    assert (settings["weight_decay"], settings["betas"]) == (0.2, (0.8, 0.9))


class Hostile:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


OPTIMIZER_FILE = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.mark.parametrize("name", [OPTIMIZER_FILE, "mp_rank_00_model_states.pt"])
def test_what_cannot_be_read_is_named_and_leaves_nothing(
    world: World, tmp_path: Path, name: str
) -> None:
    folder, ran = tmp_path / f"global_step{BEFORE}", tmp_path / "ran"
    world.run(2, start, DP2, {}, str(folder), 0)
    path = folder / name
    contents = path.read_bytes()
    arguments = (Topology(pp=2), {}, str(folder), str(tmp_path / "again"), 0)

    torch.save({"optimizer_state_dict": Hostile(ran)}, path)
    with pytest.raises(CheckpointError, match=f"{name} was refused.*no_load_optim"):
        world.run(2, go_on, *arguments)
    path.write_bytes(contents[:-100])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read.*no_load_optim"):
        world.run(2, go_on, *arguments)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing.*no_load_optim"):
        world.run(2, go_on, *arguments)
    assert list(tmp_path.iterdir()) == [folder]


def test_what_does_not_fit_is_refused(world: World, tmp_path: Path) -> None:
    folder, again = tmp_path / f"global_step{BEFORE}", str(tmp_path / "again")
    world.run(2, start, DP2, {}, str(folder), 0)
    with pytest.raises(CheckpointError, match=r"hold mlp\.linear1\.weight of layer 02 .*no_load"):
        # The weights would be refused first; here they are not read.
        world.run(1, load_without_weights, {"intermediate_size": 64}, str(folder))
    torch.save({"optimizer_state_dict": {"base_optimizer_state": []}}, folder / OPTIMIZER_FILE)
    with pytest.raises(CheckpointError, match=f"{OPTIMIZER_FILE} is not an .*no_load"):
        world.run(1, resume, ONE, {}, VOCAB, str(folder), again)


def load_without_weights(rank: int, values: dict[str, Any], folder: str) -> None:
    engine, *_ = engine_of(ONE, values)
    engine.load_optimizer(Checkpoint.open(Path(folder)), Path(folder).parent)


def load_with_scratch(rank: int, folder: str, scratch: str) -> None:
    engine, *_ = engine_of(Topology(tp=2), {})
    engine.load_optimizer(Checkpoint.open(Path(folder)), Path(scratch))


def test_a_folder_that_cannot_be_written_is_named(world: World, tmp_path: Path) -> None:
    folder, scratch = tmp_path / f"global_step{BEFORE}", tmp_path / "file"
    world.run(1, start, ONE, {}, str(folder), 0)
    scratch.touch()
    with pytest.raises(CheckpointError, match=rf"in {scratch}: .*\(on rank 0\).*no_load_optim"):
        world.run(2, load_with_scratch, str(folder), str(scratch))


def load_listening(rank: int, folder: str) -> str:
    checkpoint = Checkpoint.open(Path(folder))
    engine, *_ = engine_of(ONE, NO_PIPELINE, checkpoint)
    (handler,) = logging.getLogger("DeepSpeed").handlers
    console = handler.setStream(said := io.StringIO())
    with contextlib.redirect_stdout(said):
        engine.load_optimizer(checkpoint, Path(folder).parent)
    handler.setStream(console)
    return said.getvalue()


def test_one_line_is_said(world: World, tmp_path: Path) -> None:
    folder = tmp_path / f"global_step{BEFORE}"
    world.run(2, start, DP2, {}, str(folder), 0)
    (said,) = world.run(1, load_listening, str(folder))
    assert said == (
        "rearranging the optimizer state, saved at tp 1 x pp 1 x dp 2, for tp 1 x pp 1 x dp 1\n"
    )


def load_anything(rank: int, path: str) -> None:
    engine_of(ONE, {})
    torch.load(path, weights_only=False)


def test_no_pickle_runs_in_a_training_process_even_where_that_is_asked_for(
    world: World, tmp_path: Path
) -> None:
    path, ran = tmp_path / "step.pt", tmp_path / "ran"
    torch.save({"param": Hostile(ran)}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        world.run(1, load_anything, str(path))
    assert not ran.exists()
