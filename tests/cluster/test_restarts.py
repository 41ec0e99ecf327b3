"""When an attempt is followed by another, and from what that goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from neox.cluster import restarts
from neox.cluster.verdict import Outcome
from neox.config import NeoXConfig, from_dict

KILLED = Outcome(137, "error: killed", "rank 1 was killed", may_pass=True, iteration=5)
RAISED = Outcome(1, "Traceback", "rank 1 failed", may_pass=True, iteration=5, repeats=True)
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
    "checkpoint_factor": 5,
}


class Attempts:
    """Plays a run: each attempt saves what is given, and ends as is given."""

    def __init__(self, folder: Path, *script: tuple[str | None, Outcome]) -> None:
        self.folder = folder
        self.script = list(script)
        self.configs: list[NeoXConfig] = []
        self.environments: list[dict[str, str]] = []

    def __call__(self, config: NeoXConfig, environment: Mapping[str, str]) -> Outcome:
        self.configs.append(config)
        self.environments.append(dict(environment))
        saved, outcome = self.script.pop(0)
        if saved is not None:
            (self.folder / "latest").write_text(saved)
            (self.folder / "wandb_run.json").write_text(json.dumps({"id": f"of {saved}"}))
        return outcome


def config(folder: Path, **values: object) -> NeoXConfig:
    return from_dict(MODEL | {"save": str(folder)} | values)


def test_it_goes_on_from_what_it_has_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = Attempts(tmp_path, (None, KILLED), ("global_step5", KILLED), (None, Outcome(0)))
    base = config(tmp_path, load="base", finetune=True)
    assert restarts.run(base, attempts, 2) == 0
    first, second, third = attempts.configs
    assert first == base and second == base, "nothing of its own was there yet"
    assert (third.load, third.finetune, third.iteration) == (str(tmp_path), False, None)
    assert attempts.environments[1:] == [{}, {"WANDB_RUN_ID": "of global_step5"}]
    assert capsys.readouterr().out == (
        "restart 1 of 2, from where it began: rank 1 was killed\n"
        "restart 2 of 2, from global_step5: rank 1 was killed\n"
    )


def test_an_older_runs_checkpoints_are_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("global_step100")
    attempts = Attempts(tmp_path, (None, KILLED), (None, Outcome(0)))
    assert restarts.run(config(tmp_path), attempts, 1) == 0
    assert attempts.configs[1].load is None


def test_the_last_attempt_decides(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, *[("global_step5", KILLED)] * 3)
    assert restarts.run(config(tmp_path), attempts, 2) == 137
    assert len(attempts.configs) == 3


@pytest.mark.parametrize("outcome", [Outcome(2, "error: no data"), Outcome(143, "stopped")])
def test_what_the_user_did_is_not_tried_again(tmp_path: Path, outcome: Outcome) -> None:
    attempts = Attempts(tmp_path, (None, outcome))
    assert restarts.run(config(tmp_path), attempts, 5) == outcome.status


def test_what_fails_twice_alike_ends_it_unless_it_got_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = Attempts(tmp_path, (None, RAISED), (None, RAISED))
    assert restarts.run(config(tmp_path), attempts, 5) == 1
    assert "failed in iteration 5 twice" in capsys.readouterr().err
    attempts = Attempts(tmp_path, (None, RAISED), ("global_step5", RAISED), (None, Outcome(0)))
    assert restarts.run(config(tmp_path), attempts, 5) == 0
    attempts = Attempts(tmp_path, (None, KILLED), (None, KILLED), (None, Outcome(0)))
    assert restarts.run(config(tmp_path), attempts, 5) == 0
