"""Training at every grid is the same training: losses, gradients, norms and weights.

All grids start from the same seed, so these tests also hold initialisation and saving to account:
what is compared at the end is read back from each grid's layer files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor
from torch.testing import assert_close

from neox.checkpoint.neox import Checkpoint
from neox.data.loaders import Batch
from neox.engine.build import build_engine
from neox.engine.deepspeed import DeepSpeedEngine
from neox.engine.saved_state import in_memory
from neox.errors import ConfigError
from neox.inference.stages import InferenceModel
from neox.model.layout import LayerLayout
from neox.model.shard import shard
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.models import ARCHITECTURES, VOCAB, config_of, model_layers, tokens
from tests.world import World, forget_groups

STEPS = 10

# With Adam's usual 1e-8 a gradient that is zero but for rounding (a key's bias, which softmax does
# not see) still moves its weight by the whole rate. This epsilon makes such noise stay noise.
OPTIMIZER = {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-3}}

Values = dict[str, Any]
Case = tuple[Topology, Values]

NO_PIPELINE = {"pipe_parallel_size": 0}
SPLIT = {"sequence_parallel": True}
RECOMPUTE = {"checkpoint_activations": True, "partition_activations": True}
ZERO_1 = {"zero_optimization": {"stage": 1}}
ZERO_2 = {"zero_optimization": {"stage": 2}} | NO_PIPELINE
# The threshold: small weights would stay whole, and the test model has only such.
ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}} | NO_PIPELINE
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_WEIGHTS = {"offload_param": {"device": "cpu"}}


def batches(config: Any, groups: ProcessGroups) -> Iterator[Batch]:
    """Global batches of 4 sequences x 2 micro-steps, cut for this replica."""
    size = config.train_micro_batch_size_per_gpu
    for step in range(100):
        text = tokens(batch=4, length=17, seed=step)
        mask = torch.ones(4, 16)
        mask[:, ::5] = 0
        mine = slice(groups.dp_rank * size, (groups.dp_rank + 1) * size)
        yield Batch(text[mine, :-1], text[mine, 1:], mask[mine])


class Outcome(NamedTuple):
    """Of one rank."""

    losses: list[float]
    norms: list[float]
    validation: float
    gradients: dict[str, Tensor]  # of the first step, before clipping: the rank's shards
    weights: dict[str, Tensor]  # whole, at the end; of rank 0 only


def train_all(rank: int, cases: list[Case], folder: str) -> list[Outcome]:
    """Train each case, one after the other."""
    outcomes = []
    for number, (topology, values) in enumerate(cases):
        outcomes.append(train(topology, values, Path(folder) / f"global_step{number}"))
        forget_groups()
    return outcomes


def train(topology: Topology, values: Values, folder: Path) -> Outcome:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = config_of(
        world_size=topology.world_size,
        model_parallel_size=topology.tp,
        **{"pipe_parallel_size": topology.pp, "optimizer": OPTIMIZER, **values},
        train_micro_batch_size_per_gpu=4 // topology.dp,
    )
    engine = build_engine(config, groups, VOCAB)
    assert isinstance(engine, DeepSpeedEngine)
    gradients = of_the_first_step(engine)
    source = batches(config, groups)
    steps = [engine.train_batch(source, i, 0.01) for i in range(1, STEPS + 1)]
    validation = engine.eval_batch(source)
    if groups.rank == 0:
        folder.mkdir(parents=True)
    groups.barrier()
    engine.save(folder, {"iteration": STEPS})
    groups.barrier()
    weights = whole_weights(folder, values) if groups.rank == 0 else {}
    norms = [step.grad_norm or 0.0 for step in steps]
    return Outcome([step.loss for step in steps], norms, validation, gradients, weights)


def of_the_first_step(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """What will hold each parameter's gradient, averaged over the replicas."""
    gradients: dict[str, Tensor] = {}
    step = engine.inner.optimizer.step

    def look_and_step(*args: Any, **kwargs: Any) -> Any:
        if not gradients:
            for layer, module in engine.local:
                for name, parameter in module.named_parameters() if layer.has_file else ():
                    gradient = safe_get_full_grad(parameter)
                    gradients[f"{layer.index}.{name}"] = gradient.detach().clone()
        return step(*args, **kwargs)

    engine.inner.optimizer.step = look_and_step
    return gradients


def whole_weights(folder: Path, values: Values) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    single = ProcessGroups.single()
    return {
        f"{layer.index}.{name}": tensor
        for layer in model_layers(config_of(**values), single)
        if layer.has_file
        for name, tensor in checkpoint.read(layer, single).items()
    }


def run(world: World, folder: Path, cases: list[Case]) -> list[list[Outcome]]:
    """The outcomes by case and rank; cases of one size of the world share a call."""
    found: dict[int, list[Outcome]] = {}
    for size in {topology.world_size for topology, _ in cases}:
        numbers = [n for n, (topology, _) in enumerate(cases) if topology.world_size == size]
        arguments = ([cases[n] for n in numbers], str(folder / f"of{size}"))
        by_rank = world.run(size, train_all, *arguments, timeout=300.0)
        found |= {n: [rank[i] for rank in by_rank] for i, n in enumerate(numbers)}
    return [found[n] for n in range(len(cases))]


def check(
    world: World, folder: Path, reference: Values, cases: list[Case], loss: float = 1e-5
) -> None:
    """Each case equals one process of `reference`."""
    (single,), *results = run(world, folder, [(Topology(), reference), *cases])
    assert single.losses[0] != single.losses[-1]
    layouts = layouts_of(reference)
    for (topology, values), ranks in zip(cases, results, strict=True):
        at = f"{topology} {values}"
        seen = set()
        for rank, outcome in enumerate(ranks):
            assert outcome.losses == pytest.approx(single.losses, abs=loss), at
            assert outcome.norms == pytest.approx(single.norms, rel=1e-4), at
            assert outcome.validation == pytest.approx(single.validation, abs=loss), at
            assert outcome[:3] == ranks[0][:3], f"ranks disagree: {at}"
            tp_rank = topology.coordinate(rank).tp
            for name, gradient in outcome.gradients.items():
                whole = single.gradients[name]
                mine = shard(whole, in_memory(layouts[name]), tp_rank, topology.tp)
                close(gradient, mine, 1e-6, f"{at} rank {rank}: gradient of {name}")
            seen |= set(outcome.gradients)
        assert seen == set(single.gradients)
        for name, tensor in single.weights.items():
            close(ranks[0].weights[name], tensor, 1e-5, f"{at} {name}")


def layouts_of(values: Values) -> LayerLayout:
    return {
        f"{layer.index}.{name}": layout
        for layer in model_layers(config_of(**values), ProcessGroups.single())
        for name, layout in (layer.layout or {}).items()
    }


def close(got: Tensor, expected: Tensor, atol: float, where: str) -> None:
    assert_close(got, expected, atol=atol, rtol=1e-4, msg=lambda text: f"{where}: {text}")


GRIDS = [Topology(*g) for g in itertools.product((1, 2), repeat=3) if g != (2, 2, 2)]


@pytest.mark.parametrize("values", [{}, RECOMPUTE, ZERO_1], ids=["plain", "recomputed", "zero 1"])
def test_every_grid(world: World, tmp_path: Path, values: Values) -> None:
    cases = [(topology, values) for topology in GRIDS]
    cases += [(topology, values | SPLIT) for topology in GRIDS if topology.tp == 2]
    check(world, tmp_path, {}, cases)


def test_without_a_pipeline(world: World, tmp_path: Path) -> None:
    """ZeRO's stages, what they offload, and recomputing several layers together."""
    two, tp, four = Topology(dp=2), Topology(tp=2), Topology(dp=2, tp=2)
    all_moved = {"zero_optimization": ZERO_3["zero_optimization"] | OFFLOAD | OFFLOAD_WEIGHTS}
    together = {"checkpoint_activations": True, "checkpoint_num_layers": 2}
    cases: list[Case] = [
        (tp, SPLIT | together),
        (two, ZERO_1),
        (two, ZERO_2),
        (two, ZERO_3),
        (two, {"zero_optimization": {"stage": 1} | OFFLOAD}),
        (two, {"zero_optimization": {"stage": 2} | OFFLOAD}),
        (two, all_moved),
        (four, ZERO_2 | RECOMPUTE),
        (four, ZERO_3 | SPLIT | together),
    ]
    depth = NO_PIPELINE | {"num_layers": 3}
    check(world, tmp_path, depth, [(at, depth | values) for at, values in cases])


def test_sequential_residual(world: World, tmp_path: Path) -> None:
    values = {"gpt_j_residual": False}
    more = [SPLIT, RECOMPUTE, SPLIT | RECOMPUTE, SPLIT | ZERO_3]
    cases = [(Topology(tp=2, pp=1 if v.keys() & ZERO_3.keys() else 2), values | v) for v in more]
    check(world, tmp_path, values, cases)


def test_tied_embeddings(world: World, tmp_path: Path) -> None:
    values = {"no_weight_tying": False, "pos_emb": "learned", "rotary_pct": 1.0}
    cases = [(Topology(pp=2, tp=2), values), (Topology(pp=2, tp=2), values | SPLIT | ZERO_1)]
    cases += [(Topology(dp=2), values | ZERO_3), (Topology(dp=2, tp=2), values | SPLIT | ZERO_3)]
    check(world, tmp_path, values, cases)


def test_grouped_queries_and_gated_mlp(world: World, tmp_path: Path) -> None:
    values = {
        "num_kv_heads": 2,
        "activation": "swiglu",
        "intermediate_size": 96,
        "norm": "rmsnorm",
    }
    cases = [(Topology(pp=2, tp=2), values | more) for more in ({}, SPLIT)]
    check(world, tmp_path, values, cases)


def test_gpt_j(world: World, tmp_path: Path) -> None:
    """A bias over the vocabulary, a slice of which each tp rank has."""
    values = ARCHITECTURES["gpt_j"]
    cases = [
        (Topology(pp=2, tp=2), values | SPLIT | ZERO_1),
        (Topology(tp=2), values | RECOMPUTE),
        (Topology(dp=2, tp=2), values | ZERO_3),
        (Topology(dp=2), values | ZERO_2),
    ]
    check(world, tmp_path, values, cases)


def test_other_partitions(world: World, tmp_path: Path) -> None:
    """A stage may have no matrices, or nothing else: a large embedding fills the first one."""
    values = {
        "num_layers": 4,
        "pos_emb": "learned",
        "rotary_pct": 1.0,
        "max_position_embeddings": 1024,
    }
    by_size, evenly = ({"pipe_partition_method": name} for name in ("parameters", "uniform"))
    ends = {"pipe_partition_method": "type:embedding|head"}
    cases = [
        (Topology(pp=4), by_size),
        (Topology(pp=4), by_size | ZERO_1),
        (Topology(pp=4), evenly | ZERO_1 | {"checkpoint_activations": True}),
        (Topology(pp=2, tp=2), ends | ZERO_1),
        (Topology(pp=2, tp=2), evenly | SPLIT),
        (Topology(pp=2, dp=2), by_size | ZERO_1 | {"gradient_clipping": 0.5}),
    ]
    check(world, tmp_path, values, [(at, values | more) for at, more in cases[:-1]])
    clipped = values | {"gradient_clipping": 0.5}
    check(world, tmp_path / "clipped", clipped, [(at, values | more) for at, more in cases[-1:]])


def build(rank: int, topology: Topology, values: Values) -> None:
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = config_of(world_size=topology.world_size, pipe_parallel_size=topology.pp, **values)
    build_engine(config, groups, VOCAB)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("type:nothing", r"type:nothing matches no layer\. .*Embedding, TransformerLayer"),
        ("type:finalnorm", r"leaves stage 1 of 4 without weights to train\. Use type:transformer"),
    ],
)
def test_a_partition_that_leaves_nothing(world: World, method: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        world.run(4, build, Topology(pp=4), {"num_layers": 4, "pipe_partition_method": method})


def test_bfloat16(world: World, tmp_path: Path) -> None:
    """As close to one process in fp32 as rounding lets it be: BF16 in docs/numerics.md."""
    bf16 = {"precision": "bfloat16"}
    cases: list[Case] = [
        (Topology(), bf16),
        (Topology(pp=2), bf16),
        (Topology(dp=2), bf16),
        (Topology(tp=2), bf16),
        (Topology(pp=2, tp=2), bf16 | SPLIT | RECOMPUTE),
        (Topology(tp=2), bf16 | ZERO_2 | SPLIT),
        (Topology(dp=2), bf16 | ZERO_2),
        (Topology(dp=2), bf16 | ZERO_3),
    ]
    (single,), *results = run(world, tmp_path, [(Topology(), {}), *cases])
    layouts = layouts_of({})
    for (topology, values), ranks in zip(cases, results, strict=True):
        for rank, outcome in enumerate(ranks):
            at = f"{topology} {values} rank {rank}"
            assert outcome.losses == pytest.approx(single.losses, abs=5e-3), at
            assert outcome.validation == pytest.approx(single.validation, abs=5e-3), at
            assert outcome.norms == pytest.approx(single.norms, rel=2e-2), at
            assert outcome.losses != single.losses
            for name, gradient in outcome.gradients.items():
                whole, tp_rank = single.gradients[name], topology.coordinate(rank).tp
                mine = shard(whole, in_memory(layouts[name]), tp_rank, topology.tp)
                assert gradient.dtype == torch.float32
                assert (gradient - mine).norm() <= 5e-2 * mine.norm(), f"{at} {name}"


DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


@pytest.mark.parametrize(
    ("topology", "extra"),
    [
        (Topology(tp=2, pp=2), {"gpt_j_residual": True}),
        (Topology(tp=2), {"gpt_j_residual": False} | NO_PIPELINE),
    ],
    ids=["parallel residual", "sequential residual"],
)
def test_dropout_is_the_same_however_activations_are_kept(
    world: World, tmp_path: Path, topology: Topology, extra: Values
) -> None:
    """Exactly, where no sum is taken in another order: nothing else could be told from noise."""
    values = DROPOUT | extra | {"num_layers": 4}
    in_cpu = {"checkpoint_activations": True, "checkpoint_in_cpu": True, "checkpoint_num_layers": 2}
    same: list[Values] = [RECOMPUTE, in_cpu, RECOMPUTE | {"checkpoint_num_layers": 3}]
    cases = [(topology, values | more) for more in [{}, *same, SPLIT, SPLIT | RECOMPUTE]]
    (kept, *_), *others, (split, *_), (both, *_) = run(world, tmp_path, cases)
    assert kept.losses[0] != kept.validation
    for (other, *_), more in zip(others, same, strict=True):
        assert other.losses == kept.losses, more
        for name, gradient in kept.gradients.items():
            assert torch.equal(other.gradients[name], gradient), (more, name)
    assert both.losses == split.losses == pytest.approx(kept.losses, abs=1e-5)
    for name, gradient in kept.gradients.items():
        close(split.gradients[name], gradient, 1e-6, f"split {name}")


def lent_logits(rank: int, values: Values) -> Tensor:
    """Of 5 tokens, which don't divide by 2, between two steps of training."""
    groups = initialize(Topology(tp=2), "gloo", torch.device("cpu"))
    settings = {"world_size": 2, "model_parallel_size": 2} | NO_PIPELINE | values
    config = config_of(**settings, train_micro_batch_size_per_gpu=4, optimizer=OPTIMIZER)
    engine = build_engine(config, groups, VOCAB)
    source = batches(config, groups)
    engine.train_batch(source, 1, 0.01)
    with engine.lend() as local:
        model = InferenceModel(config, groups, local, VOCAB, torch.float32)
        logits = model(tokens(batch=2, length=5))
    engine.train_batch(source, 2, 0.01)
    assert logits is not None
    return logits


def test_a_model_that_splits_sequences_is_lent_whole(world: World) -> None:
    whole, split = (world.run(2, lent_logits, values)[1] for values in ({}, SPLIT))
    close(split, whole, 1e-5, "logits")


def replicas_after_training(rank: int) -> list[str]:
    topology = Topology(tp=4)
    groups = initialize(topology, "gloo", torch.device("cpu"))
    config = config_of(world_size=4, model_parallel_size=4, optimizer=OPTIMIZER, **SPLIT)
    engine = build_engine(config, groups, VOCAB)
    source = batches(config, groups)
    for iteration in range(1, 4):
        engine.train_batch(source, iteration, 0.01)
    differing = []
    for layer, module in engine.local:
        for name, parameter in module.named_parameters() if layer.has_file else ():
            if layer.layout[name].dim is None:
                copies = [torch.empty_like(parameter) for _ in range(4)]
                torch.distributed.all_gather(copies, parameter.detach())
                if not all(torch.equal(copy, copies[0]) for copy in copies):
                    differing.append(f"{layer.index}.{name}")
    return differing


def test_copies_of_a_parameter_stay_equal_with_sequences_split_in_four(world: World) -> None:
    """Four summands have sums that depend on their order; a checkpoint keeps one of the copies."""
    assert world.run(4, replicas_after_training) == [[]] * 4
