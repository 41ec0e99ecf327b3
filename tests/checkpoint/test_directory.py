"""A directory of checkpoints: what is written, what is pruned, what a failure leaves behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.directory import check_writable, keep_last, recover, steps, write_checkpoint
from neox.checkpoint.files import save_file
from neox.checkpoint.manifest import Entry, Hasher, Manifest
from neox.checkpoint.neox import Checkpoint
from neox.checkpoint.verify import verify
from neox.config.architecture import architecture
from neox.errors import CheckpointError
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from tests.models import VOCAB, config_of, model_layers, random_weights, write_model
from tests.small_disk import small_files
from tests.world import World

SINGLE = ProcessGroups.single()
ABOUT: dict[str, Any] = {
    "grid": {"tp": 1, "pp": 1, "dp": 1},
    "padded_vocab_size": VOCAB,
    "architecture": {},
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With a checkpoint of step 7."""
    write_model(tmp_path, 7, seed=7)
    return tmp_path


def names(directory: Path) -> list[str]:
    return [folder.name for folder in steps(directory)]


def embedding(directory: Path, iteration: int | None = None) -> torch.Tensor:
    layer = model_layers(config_of(), SINGLE)[0]
    return Checkpoint.open(directory, iteration).read(layer, SINGLE)["word_embeddings.weight"]


def embedding_of(seed: int) -> torch.Tensor:
    return random_weights(config_of(), seed)["0.word_embeddings.weight"]


def test_a_checkpoint_tells_what_it_is(directory: Path) -> None:
    folder = directory / "global_step7"
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert manifest.iteration == 7
    assert manifest.grid == {"tp": 1, "pp": 1, "dp": 1}
    assert manifest.padded_vocab_size == VOCAB
    assert manifest.architecture == architecture(config_of())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest.files) == files - {"manifest.json"}
    assert "configs/small.yml" in files and "layer_00-model_00-model_states.pt" in files
    assert verify(folder) == []
    assert (directory / "latest").read_text() == "global_step7"
    assert sorted(path.name for path in directory.iterdir()) == ["global_step7", "latest"]


def test_a_step_may_be_saved_again(directory: Path) -> None:
    write_model(directory, 7, seed=1)
    assert torch.equal(embedding(directory), embedding_of(1))
    assert sorted(path.name for path in directory.iterdir()) == ["global_step7", "latest"]


@pytest.mark.parametrize("below", [".", "further/down"])
def test_a_save_folder_that_cannot_be_is_known_at_once(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"save: checkpoints cannot be written to .*file"):
        check_writable(tmp_path / "file" / below)
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


# Pruning


def test_only_the_newest_are_kept(directory: Path) -> None:
    for iteration in (9, 10, 100):
        write_model(directory, iteration)
    keep_last(directory, 2, SINGLE)
    assert names(directory) == ["global_step100", "global_step10"]
    assert not (directory / ".unfinished").exists()


def test_the_one_just_written_is_kept_after_going_back_to_an_earlier_step(directory: Path) -> None:
    for iteration in (9, 10, 8):
        write_model(directory, iteration)
    keep_last(directory, 2, SINGLE)
    assert names(directory) == ["global_step10", "global_step8"]
    assert Checkpoint.open(directory).iteration == 8


def test_one_that_is_not_whole_does_not_count(directory: Path) -> None:
    for iteration in (8, 9, 10, 11):
        write_model(directory, iteration)
    for iteration in (8, 10):
        next((directory / f"global_step{iteration}").glob("layer_02*")).unlink()
    keep_last(directory, 2, SINGLE)
    assert names(directory) == ["global_step11", "global_step10", "global_step9"]
    keep_last(directory, 1, SINGLE)
    assert names(directory) == ["global_step11"]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(directory, 8)
    (directory / ".unfinished").write_text("in the way")
    keep_last(directory, 1, SINGLE)
    assert "old checkpoints in" in capsys.readouterr().err
    assert names(directory) == ["global_step8", "global_step7"]


# What a killed run leaves


def test_an_unfinished_save_is_deleted(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = directory / ".unfinished/global_step8"
    unfinished.mkdir(parents=True)
    (unfinished / "layer_00-model_00-model_states.pt").write_bytes(b"a part")
    (directory / ".unfinished/global_step5.deleted").mkdir()
    recover(directory, SINGLE)
    said = capsys.readouterr().out
    assert (
        said
        == f"save: deleted what an interrupted save of global_step8 left in {unfinished.parent}\n"
    )
    assert sorted(path.name for path in directory.iterdir()) == ["global_step7", "latest"]


@pytest.mark.parametrize("has_new", [True, False])
def test_an_interrupted_replacement_is_undone(directory: Path, has_new: bool) -> None:
    unfinished = directory / ".unfinished"
    unfinished.mkdir()
    if has_new:
        (unfinished / "global_step7").mkdir()
    (directory / "global_step7").rename(unfinished / "global_step7.replaced")
    recover(directory, SINGLE)
    assert torch.equal(embedding(directory), embedding_of(7))
    assert not unfinished.exists()


def test_a_replacement_that_was_done_is_not_undone(directory: Path) -> None:
    (directory / ".unfinished").mkdir()
    (directory / "global_step7").rename(directory / ".unfinished/global_step7.replaced")
    write_model(directory / "elsewhere", 7, seed=1).rename(directory / "global_step7")
    recover(directory, SINGLE)
    assert torch.equal(embedding(directory), embedding_of(1))
    assert not (directory / ".unfinished").exists()


def test_the_next_save_recovers_too(directory: Path) -> None:
    (directory / ".unfinished/global_step9").mkdir(parents=True)
    (directory / ".unfinished/global_step9/part").touch()
    (directory / "global_step7").rename(directory / ".unfinished/global_step7.replaced")
    write_model(directory, 9, seed=9)
    assert names(directory) == ["global_step9", "global_step7"]
    assert verify(directory / "global_step9") == []
    assert sorted(path.name for path in (directory / "global_step9").iterdir()) == sorted(
        path.name for path in (directory / "global_step7").iterdir()
    )


# A save that fails


def failing(reason: int) -> Callable[[Path], dict[str, Entry]]:
    def write(folder: Path) -> dict[str, Entry]:
        (folder / "part").write_text("x")
        raise OSError(reason, os.strerror(reason))

    return write


def test_a_save_that_fails_leaves_the_last_one_and_no_other(directory: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        write_checkpoint(directory, 8, failing(errno.ENOSPC), {}, SINGLE, **ABOUT)
    assert str(raised.value) == (
        f"save: the checkpoint of iteration 8 could not be written to {directory}: No space left "
        f"on device. Earlier checkpoints are untouched; the newest is {directory / 'global_step7'}."
    )
    assert sorted(path.name for path in directory.iterdir()) == ["global_step7", "latest"]
    assert Checkpoint.open(directory).iteration == 7


def test_a_first_save_that_fails_says_that_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"device\. There is no earlier checkpoint\."):
        write_checkpoint(tmp_path, 8, failing(errno.ENOSPC), {}, SINGLE, **ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_between_the_renames_is_undone(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.parent.name == ".unfinished" and target == directory / "global_step7":
            monkeypatch.undo()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match=r"Input/output error"):
        write_model(directory, 7, seed=1)
    assert torch.equal(embedding(directory), embedding_of(7))


def test_torch_does_not_hide_the_systems_reason(directory: Path) -> None:
    with (
        small_files(4096),
        pytest.raises(CheckpointError, match=r"iteration 8 .*: File too large\. Earlier"),
    ):
        write_model(directory, 8)
    assert sorted(path.name for path in directory.iterdir()) == ["global_step7", "latest"]


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])  # of SIGINT, of SIGTERM
def test_a_signal_in_the_middle_of_a_file_is_not_torchs_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: type[BaseException]
) -> None:
    def interrupt(hasher: Hasher, data: bytes) -> None:
        raise signal

    monkeypatch.setattr(Hasher, "update", interrupt)
    with pytest.raises(signal):
        save_file({"x": torch.ones(8)}, tmp_path / "x.pt")


# Several ranks


def save_as_ranks(rank: int, directory: str, behaviour: str) -> str:
    """Every rank writes a file of its own; what each one raises, or the step's folder."""
    groups = initialize(Topology(dp=2), "gloo", torch.device("cpu"))

    def write(folder: Path) -> dict[str, Entry]:
        path = folder / f"layer_0{rank}-model_00-model_states.pt"
        if behaviour == "fail" and rank == 1:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        entry = save_file({"x": torch.full((8,), rank)}, path)
        if behaviour == "elsewhere" and rank == 1:
            path.unlink()  # as if it had been written to another machine's disk
        return {path.name: entry}

    if behaviour == "unwritable" and rank == 0:
        (Path(directory) / ".unfinished").write_text("in the way")
    try:
        return str(write_checkpoint(Path(directory), 8, write, {"a.yml": "{}"}, groups, **ABOUT))
    except CheckpointError as error:
        return str(error)


def test_ranks_write_together(world: World, directory: Path) -> None:
    folder = directory / "global_step8"
    assert world.run(2, save_as_ranks, str(directory), "") == [str(folder)] * 2
    manifest = Manifest.read(folder)
    assert manifest is not None and len(manifest.files) == 3
    for path in folder.glob("layer_*"):
        manifest.check(path)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("fail", "Disk quota exceeded (on rank 1)"),
        ("elsewhere", "layer_01-model_00-model_states.pt is missing"),
        ("unwritable", "Not a directory (on rank 0)"),
    ],
)
def test_what_fails_on_one_rank_is_known_to_all(
    world: World, directory: Path, behaviour: str, reason: str
) -> None:
    said = world.run(2, save_as_ranks, str(directory), behaviour)
    assert said[0] == said[1]
    assert reason in said[0] and "iteration 8 could not be written" in said[0]
    assert said[0].endswith(f"the newest is {directory / 'global_step7'}.")
    assert not (directory / "global_step8").exists()
    assert not (directory / ".unfinished").is_dir()
