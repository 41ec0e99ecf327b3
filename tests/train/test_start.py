"""What a run starts from: the newest checkpoint that is whole, and never a damaged one."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.manifest import MANIFEST
from neox.checkpoint.neox import layer_file
from neox.checkpoint.verify import verify
from neox.config import load_config
from neox.entrypoints.train import main
from neox.errors import CheckpointError
from neox.parallel.groups import ProcessGroups, initialize
from neox.parallel.topology import Topology
from neox.train.start import Start, find_start
from tests import small_tokenizer
from tests.data.datasets import write_dataset
from tests.models import BASE, config_of, write_model
from tests.world import World

SINGLE = ProcessGroups.single()


def start(directory: Path, **values: Any) -> Start:
    return find_start(config_of(load=str(directory), **values), SINGLE)


def own(directory: Path, **values: Any) -> Start:
    """The start of a run that saves where it loads."""
    return start(directory, save=str(directory), checkpoint_factor=2, **values)


def flip(path: Path, at: int = 100) -> None:
    contents = bytearray(path.read_bytes())
    contents[at] ^= 1
    path.write_bytes(contents)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With whole checkpoints of the steps 2, 4 and 6."""
    for iteration in (2, 4, 6):
        write_model(tmp_path, iteration)
    return tmp_path


def damage(directory: Path, iteration: int, layer: int = 3) -> None:
    flip(layer_file(directory / f"global_step{iteration}", layer, 0))


# What is used


def test_the_latest_is_resumed(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(directory).iteration == 6
    assert capsys.readouterr().err == ""


def test_a_damaged_newest_is_named_and_the_newest_whole_one_is_used(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(directory, 6)
    assert start(directory).iteration == 4
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("warning: load: global_step6 is damaged, and not used: ")
    assert f"{directory}/global_step6/layer_03-model_00-model_states.pt is damaged" in said.err
    damage(directory, 4)
    assert start(directory).iteration == 2


def test_many_damaged_files_take_one_line(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (directory / "global_step6").glob("layer_*"):
        path.write_bytes(b"")
    assert start(directory).iteration == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "There are 3 more such files." in said


def test_without_a_whole_one_there_is_no_start(directory: Path) -> None:
    for iteration in (2, 4, 6):
        damage(directory, iteration)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be resumed\. .*step6.*step4"
    ):
        start(directory)
    with pytest.raises(CheckpointError, match=r"No other checkpoint in .* is whole"):
        start(directory, iteration=2)


@pytest.mark.parametrize("asked", [{"iteration": 6}, {"finetune": True}])
def test_what_is_asked_for_is_not_replaced(directory: Path, asked: dict[str, Any]) -> None:
    damage(directory, 6)
    damage(directory, 4)
    with pytest.raises(CheckpointError) as raised:
        start(directory, **asked)
    assert "layer_03-model_00-model_states.pt is damaged" in str(raised.value)
    assert str(raised.value).endswith(f"is {directory}/global_step2: use --iteration 2.")
    assert start(directory, **(asked | {"iteration": 2})).checkpoint is not None


def test_finetuning_reads_weights_only(directory: Path) -> None:
    (directory / "global_step6/configs/small.yml").unlink()
    assert start(directory, finetune=True).iteration == 0
    assert start(directory, no_load_optim=True).iteration == 6
    assert start(directory).iteration == 4


# `latest`


@pytest.mark.parametrize(
    ("latest", "said"),
    [
        (None, "is missing or empty"),
        (b"", "is missing or empty"),
        (b"global_step8", "names global_step8, which is not there"),
        (b"\x80\x04\x95\x00\nglobal", "names \ufffd?\ufffd??global, which is not there"),
        (b"x" * 5000, f"names {'x' * 100}, which is not there"),
    ],
    ids=["missing", "empty", "dangling", "binary", "long"],
)
def test_latest_is_not_needed(
    directory: Path, capsys: pytest.CaptureFixture[str], latest: bytes | None, said: str
) -> None:
    (directory / "latest").unlink()
    if latest is not None:
        (directory / "latest").write_bytes(latest)
    damage(directory, 6)
    assert own(directory).iteration == 4
    first, second = capsys.readouterr().err.splitlines()
    assert said in first
    assert "global_step6 is damaged" in second


def test_latest_is_followed_to_an_older_step_and_a_line_says_so(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "latest").write_text("global_step4")
    assert start(directory).iteration == 4
    said = capsys.readouterr()
    assert "names global_step4, which is used, although global_step6 is there" in said.out
    damage(directory, 4)
    assert start(directory).iteration == 2  # not 6, which is not older


def test_only_an_unfinished_save_is_a_fresh_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".unfinished/global_step2").mkdir(parents=True)
    assert own(tmp_path) == Start()
    assert "no checkpoint in" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no `latest` file"):
        start(tmp_path)  # of another run: there should be one


def test_weights_in_the_folder_to_save_to_are_never_passed_over(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 6)
    assert own(folder).iteration == 6
    (folder / MANIFEST).unlink()
    assert own(folder.rename(tmp_path / "weights")).checkpoint is not None


def test_a_step_folder_may_be_given(directory: Path) -> None:
    assert start(directory / "global_step4").iteration == 4
    damage(directory, 4)
    with pytest.raises(CheckpointError, match=r"layer_03.* is damaged.*global_step6: use --it"):
        start(directory / "global_step4")


# Without a manifest, as upstream writes


@pytest.fixture
def upstreams(directory: Path) -> Path:
    for path in directory.glob(f"*/{MANIFEST}"):
        path.unlink()
    return directory


def test_without_a_manifest_the_checksums_of_torch_count(
    upstreams: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(upstreams).iteration == 6
    path = layer_file(upstreams / "global_step6", 3, 0)
    flip(path, at=path.stat().st_size // 2)
    assert start(upstreams).iteration == 4
    assert f"{path} is damaged: the checksum of " in capsys.readouterr().err


@pytest.mark.parametrize("layer", [0, 2, 3, 5])
def test_without_a_manifest_a_gap_is_noticed(
    upstreams: Path, capsys: pytest.CaptureFixture[str], layer: int
) -> None:
    layer_file(upstreams / "global_step6", layer, 0).unlink()
    assert start(upstreams).iteration == 4
    assert "global_step6 is incomplete" in capsys.readouterr().err


def test_a_manifest_that_was_there_is_missed(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "global_step6" / MANIFEST).unlink()
    torch.save({"has_manifest": True}, directory / "global_step6/mp_rank_00_model_states.pt")
    assert start(directory).iteration == 4
    assert f"{MANIFEST} is missing" in capsys.readouterr().err


def test_a_renamed_folder_is_not_another_step(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "global_step6").rename(directory / "global_step8")
    assert start(directory).iteration == 4
    assert f"{MANIFEST} is that of iteration 6" in capsys.readouterr().err


def test_a_file_too_many_is_noticed(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = directory / "global_step6"
    shutil.copy(layer_file(folder, 3, 0), layer_file(folder, 4, 0))
    assert start(directory).iteration == 4
    assert "layer_04-model_00-model_states.pt does not belong" in capsys.readouterr().err


# Several ranks


def start_as_ranks(rank: int, directory: str) -> int:
    groups = initialize(Topology(dp=3), "gloo", torch.device("cpu"))
    return find_start(config_of(world_size=3, load=directory), groups).iteration


def start_as_a_run_saves(rank: int, directory: str, **values: Any) -> int:
    """Where each rank finds another `latest`, as when a run saves in the meantime."""
    groups = initialize(Topology(dp=3), "gloo", torch.device("cpu"))
    config = config_of(world_size=3, load=directory, **values)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("neox.checkpoint.folders", "neox.train.start"):
            patch.setattr(f"{module}.latest_name", lambda _: f"global_step{6 - 2 * rank}")
        checkpoint = find_start(config, groups).checkpoint
        assert checkpoint is not None
        return checkpoint.iteration


@pytest.mark.parametrize("finetune", [False, True])
def test_ranks_start_from_one_step(world: World, directory: Path, finetune: bool) -> None:
    start = partial(start_as_a_run_saves, finetune=finetune)
    assert world.run(3, start, str(directory)) == [6, 6, 6]


def verify_with_one_blind(rank: int, folder: str) -> list[str]:
    groups = initialize(Topology(dp=3), "gloo", torch.device("cpu"))
    return verify(Path(folder if rank != 1 else f"{folder}/nowhere"), groups)


def test_what_one_rank_cannot_see_is_told_by_all(world: World, directory: Path) -> None:
    found = world.run(3, verify_with_one_blind, str(directory / "global_step6"))
    assert "nowhere" in str(found[0]) and found == found[:1] * 3


def test_ranks_share_the_work_and_decide_alike(world: World, directory: Path) -> None:
    for layer in (0, 2, 3, 5, 6):  # each rank verifies one or two of them
        shutil.rmtree(directory / "global_step6")
        write_model(directory, 6)
        damage(directory, 6, layer)
        assert world.run(3, start_as_ranks, str(directory)) == [4, 4, 4], layer


# Every byte of every file


def run_train(rank: int, folder: str) -> None:
    main(load_config([f"{folder}/small.yml"], world_size=1), SINGLE)


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, of the steps 2 and 4, of a run of train.py: files of every kind."""
    folder = tmp_path_factory.mktemp("trained")
    small_tokenizer.write(folder)
    write_dataset(folder / "data", [40] * 30, modulo=280)
    values = BASE | {
        "tokenizer_type": "HFTokenizer",
        "vocab_file": f"{folder}/tokenizer.json",
        "data_path": f"{folder}/data",
        "save": f"{folder}/run",
        "checkpoint_factor": 2,
        "zero_optimization": {"stage": 1},
        "log_dir": f"{folder}/logs",
    }
    (folder / "small.yml").write_text(json.dumps(values))
    world.run(1, run_train, str(folder))
    return folder / "run"


KINDS = ["layer_", "mp_rank_", "zero_pp_rank_", "configs/", MANIFEST]


def files(trained: Path, kind: str) -> list[Path]:
    folder = trained / "global_step4"
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix().startswith(kind)
    ]


@pytest.fixture
def spoiled(trained: Path) -> Iterator[Callable[[Path, bytes | None], str]]:
    """spoiled(path, contents): what a run says that starts then, and goes on from step 2."""
    originals: dict[Path, bytes] = {}

    def spoil(path: Path, contents: bytes | None) -> str:
        original = originals.setdefault(path, path.read_bytes())
        if contents is None:
            path.unlink()
        else:
            path.write_bytes(contents)
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("neox.log.warning", said.append)
            assert start(trained).iteration == 2, (path, said)
        path.write_bytes(original)
        return " ".join(said)

    yield spoil
    for path, original in originals.items():
        path.write_bytes(original)


def test_there_are_files_of_every_kind(trained: Path) -> None:
    assert all(files(trained, kind) for kind in KINDS)
    assert sum(len(files(trained, kind)) for kind in KINDS) == sum(
        path.is_file() for path in (trained / "global_step4").rglob("*")
    )
    assert start(trained).iteration == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_byte_is_found_and_the_file_is_named(
    trained: Path, spoiled: Callable[[Path, bytes | None], str], kind: str
) -> None:
    draw = random.Random(kind)
    paths = files(trained, kind)
    for case in range(60):
        path = paths[case % len(paths)]
        contents = bytearray(path.read_bytes())
        at = draw.randrange(len(contents))
        contents[at] ^= draw.randrange(1, 256)
        assert str(path) in spoiled(path, bytes(contents)), (path, at)


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncated_missing_or_longer_file_is_found_and_named(
    trained: Path, spoiled: Callable[[Path, bytes | None], str], kind: str
) -> None:
    draw = random.Random(kind)
    for path in files(trained, kind):
        contents = path.read_bytes()
        lengths = [0, 1, draw.randrange(len(contents)), len(contents) - 1]
        for length in lengths:
            assert str(path) in spoiled(path, contents[:length]), (path, length)
        assert str(path) in spoiled(path, contents + b"\n"), path
        assert str(path) in spoiled(path, None), path


def test_every_flipped_byte_of_latest_is_told(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It costs no step, unless another step's name comes out of it."""
    path = trained / "latest"
    original = path.read_bytes()
    draw = random.Random(0)
    for at in range(len(original)):
        for flipped in {*(1 << bit for bit in range(8)), *draw.choices(range(1, 256), k=4)}:
            contents = bytearray(original)
            contents[at] ^= flipped
            path.write_bytes(contents)
            iteration = start(trained).iteration
            said = capsys.readouterr()
            assert "`latest` in" in said.out + said.err, contents
            assert iteration == (2 if contents == b"global_step2" else 4), contents
    path.write_bytes(original)
