"""What 8 bits cost in learning, on real text: the topics of Python's help()."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from neox.checkpoint.neox import Checkpoint
from neox.config import NeoXConfig
from neox.data.loaders import Batch
from neox.engine.build import build_engine
from neox.engine.deepspeed import DeepSpeedEngine
from neox.engine.eight_bit import is_eight_bit
from neox.parallel.groups import ProcessGroups
from neox.parallel.rng import derive_seed
from tests.models import config_of
from tests.world import World

VOCAB, LENGTH, BATCH = 256, 32, 4
STEPS = int(os.environ.get("NEOX_LORA_STEPS", "60"))  # 200 take a minute
MODEL: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "seq_length": LENGTH,
    "max_position_embeddings": LENGTH,
    "pipe_parallel_size": 0,
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8}},
}
LORA = {"lora": {"rank": 16, "alpha": 32}}
EIGHT_BIT = {"load_in_8bit": True}
EIGHT_BIT_ADAM = {"use_bnb_optimizer": True}


def text(about: str) -> Tensor:
    """A topic's bytes as tokens."""
    return torch.tensor(list(topics[about].encode()), dtype=torch.int64)


def batches(tokens: Tensor) -> Iterator[Batch]:
    """Rows from places that the step alone decides."""
    for step in itertools.count():
        generator = torch.Generator().manual_seed(derive_seed("rows", step))
        starts = torch.randint(len(tokens) - LENGTH - 1, (BATCH,), generator=generator)
        rows = torch.stack([tokens[start : start + LENGTH + 1] for start in starts])
        yield Batch(rows[:, :-1], rows[:, 1:], torch.ones(BATCH, LENGTH))


def build(config: NeoXConfig) -> DeepSpeedEngine:
    base = Checkpoint.open(Path(config.load)) if config.load else None
    engine = build_engine(config, ProcessGroups.single(), VOCAB, base)
    assert isinstance(engine, DeepSpeedEngine)
    return engine


def pretrain(rank: int, folder: str) -> float:
    """The base: a model that has read one page."""
    engine = build(config_of(**MODEL))
    source = batches(text("specialnames"))
    loss = [engine.train_batch(source, i, 2e-3).loss for i in range(1, 101)][-1]
    Path(folder).mkdir()
    engine.save(Path(folder), {"iteration": 100})
    return loss


def finetune(rank: int, folder: str, values: dict[str, Any]) -> list[float]:
    """Losses of learning the other pages."""
    engine = build(config_of(**MODEL | LORA | values, load=folder))
    assert is_eight_bit(engine.inner.optimizer) == ("use_bnb_optimizer" in values)
    source = batches(text("debugger"))
    return [engine.train_batch(source, i, 2e-3).loss for i in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, world: World) -> str:
    folder = tmp_path_factory.mktemp("base") / "global_step100"
    (loss,) = world.run(1, pretrain, str(folder))
    assert loss < 3.0
    return str(folder)


def last(losses: list[float]) -> float:
    return sum(losses[-20:]) / 20


def test_eight_bits_learn_as_much(world: World, base: str) -> None:
    runs = [{}, EIGHT_BIT, EIGHT_BIT | EIGHT_BIT_ADAM, EIGHT_BIT_ADAM]
    plain, held, both, adam = (world.run(1, finetune, base, values)[0] for values in runs)
    assert last(plain) < 0.95 * plain[0], "it has learned something"
    assert last(held) == pytest.approx(last(plain), rel=0.02)
    assert last(adam) == pytest.approx(last(plain), rel=0.02)
    assert last(both) == pytest.approx(last(held), rel=0.02)
    assert held != plain and both != held and adam != plain
