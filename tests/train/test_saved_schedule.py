"""Which schedule a resumed run follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.sources import model_file
from neox.config import NeoXConfig
from neox.errors import CheckpointError
from neox.train.saved_schedule import SAVED, schedule_state, settle_schedule
from neox.train.schedule import learning_rate
from tests.models import write_model

Make = Callable[..., NeoXConfig]
BEFORE: dict[str, Any] = {
    "optimizer": {"type": "Adam", "params": {"lr": 2e-3}},
    "lr_decay_style": "linear",
    "warmup": 0.07,
    "min_lr": 1e-5,
    "train_iters": 300,
}


@pytest.fixture
def saved(make_config: Make, tmp_path: Path) -> Callable[..., Checkpoint]:
    """A checkpoint of step 6 that tells the schedule of the configuration with these keys."""

    def make(**values: Any) -> Checkpoint:
        folder = write_model(tmp_path, 6)
        state = schedule_state(make_config(**values), 6)
        torch.save({SAVED: state}, model_file(folder, 0))
        return Checkpoint.open(folder)

    return make


def settled(config: NeoXConfig, checkpoint: Checkpoint | None) -> NeoXConfig:
    return settle_schedule(config, checkpoint, with_optimizer=True)


def curve(config: NeoXConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(400)]


@pytest.mark.parametrize(
    "before",
    [
        BEFORE,
        BEFORE | {"lr_decay_iters": 123},
        BEFORE | {"lr_decay_fraction": 0.37, "lr_decay_style": "exponential"},
        BEFORE | {"lr_decay_style": "wsd", "wsd_decay_ratio": 0.3, "wsd_decay_style": "minus_sqrt"},
        {"lr_decay_style": "constant", "warmup": 1 / 3},
    ],
)
def test_the_checkpoints_is_followed_to_the_last_bit(
    make_config: Make,
    saved: Callable[..., Checkpoint],
    capsys: pytest.CaptureFixture[str],
    before: dict[str, Any],
) -> None:
    config = make_config(use_checkpoint_lr_scheduler=True, train_iters=50)
    followed = settled(config, saved(**before))
    assert curve(followed) == curve(make_config(**before))
    assert curve(config) != curve(followed)
    assert followed.train_iters == 50
    assert followed.origin("lr") == followed.origin("warmup") == "checkpoint"
    assert "the schedule is the checkpoint's: " in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.01, 0.07, 1 / 3, 0.1, 0.29, 0.123456789])
@pytest.mark.parametrize("total", [3, 20, 137, 143000, 320000])
def test_any_warmup_comes_back_exactly(
    make_config: Make, saved: Callable[..., Checkpoint], share: float, total: int
) -> None:
    before = {"warmup": share, "train_iters": total, "min_lr": 0.0}
    config = make_config(use_checkpoint_lr_scheduler=True, min_lr=0.0)
    followed = settled(config, saved(**before))
    assert followed.warmup * total == share * total


def test_the_configurations_is_followed_and_a_line_tells_the_difference(
    make_config: Make, saved: Callable[..., Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(min_lr=2e-4, warmup=0.5)
    assert settled(config, saved()) is config
    assert capsys.readouterr() == (
        "",
        "warning: the checkpoint's schedule has min_lr 0.0001 and warmup 0.1, but this run follows "
        "the configuration's: min_lr 0.0002 and warmup 0.5. Set use_checkpoint_lr_scheduler: true "
        "to follow the checkpoint's, or override_lr_scheduler: true if the change is meant.\n",
    )
    config = make_config(min_lr=2e-4, override_lr_scheduler=True)
    assert settled(config, saved()) is config
    assert capsys.readouterr() == (
        "override_lr_scheduler: min_lr 0.0002, while the checkpoint's schedule has min_lr 0.0001\n",
        "",
    )


@pytest.mark.parametrize("key", [None, "override_lr_scheduler", "use_checkpoint_lr_scheduler"])
def test_equal_schedules_need_no_line(
    make_config: Make,
    saved: Callable[..., Checkpoint],
    capsys: pytest.CaptureFixture[str],
    key: str | None,
) -> None:
    config = make_config(**({key: True} if key else {}))
    # Said otherwise, and the keys of wsd are of no meaning to a cosine.
    checkpoint = saved(train_iters=40, lr_decay_fraction=0.5, wsd_decay_ratio=0.4)
    capsys.readouterr()
    assert settled(config, checkpoint) is config
    assert capsys.readouterr() == ("", "")


def test_a_run_that_starts_anew_has_its_own(
    make_config: Make, saved: Callable[..., Checkpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved(**BEFORE)
    config = make_config(finetune=True, use_checkpoint_lr_scheduler=True)
    capsys.readouterr()
    assert settled(config, checkpoint) is config
    assert settled(make_config(use_checkpoint_lr_scheduler=True), None).lr == 1e-3
    dropping = make_config(no_load_optim=True)
    assert settle_schedule(dropping, checkpoint, with_optimizer=False) is dropping
    assert capsys.readouterr() == ("", "")
    asking = make_config(no_load_optim=True, use_checkpoint_lr_scheduler=True)
    assert settle_schedule(asking, checkpoint, with_optimizer=False).lr == 2e-3


@pytest.mark.parametrize(
    "state",
    [
        None,
        {"start_lr": 1e-3},
        {"start_lr": 1e-3, "min_lr": 0, "warmup_iter": 1, "end_iter": 0, "decay_style": "linear"},
        {"start_lr": 1e-3, "min_lr": 0, "warmup_iter": 1, "end_iter": 9, "decay_style": "steps"},
        {"start_lr": "?", "min_lr": 0, "warmup_iter": 1, "end_iter": 9, "decay_style": "linear"},
    ],
)
def test_a_schedule_that_is_not_there_cannot_be_followed(
    make_config: Make,
    saved: Callable[..., Checkpoint],
    capsys: pytest.CaptureFixture[str],
    state: dict[str, Any] | None,
) -> None:
    checkpoint = saved()
    torch.save({SAVED: state}, model_file(checkpoint.folder, 0))
    with pytest.raises(CheckpointError, match="use_checkpoint_lr_scheduler"):
        settled(make_config(use_checkpoint_lr_scheduler=True), checkpoint)
    config = make_config()
    capsys.readouterr()
    assert settled(config, checkpoint) is config
    assert ("cannot be read" in capsys.readouterr().err) == (state is not None)
