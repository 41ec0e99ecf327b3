"""How many processes a run has, and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neox.cluster import launch
from neox.cluster.hosts import cuda_devices, read_hostfile, select, slurm_hosts
from neox.cluster.launch import Plan, find_devices, make_plan
from neox.cluster.main import main
from neox.config import Devices, NeoXConfig, from_dict
from neox.errors import ConfigError

MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "max_position_embeddings": 16,
}


def config(world_size: int = 1, **values: Any) -> NeoXConfig:
    return from_dict({**MODEL, **values}, world_size=world_size)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cuda_devices", list)
    for name in ("DLTS_HOSTFILE", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cuda_devices", lambda: [0, 1, 2, 3])
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)


@pytest.mark.usefixtures("no_cuda")
def test_a_cpu_runs_as_many_processes_as_asked_for_else_as_one_model_needs() -> None:
    assert make_plan(config()) == Plan({"localhost": [0]}, "cpu")
    grid = {"model_parallel_size": 2, "pipe_parallel_size": 2}
    assert make_plan(config(4, **grid)) == Plan({"localhost": [0, 1, 2, 3]}, "cpu")
    assert make_plan(config(8, num_gpus=8, **grid)).world_size == 8
    with pytest.raises(ConfigError, match="num_nodes is 2, but no hostfile"):
        make_plan(config(2, num_nodes=2))


@pytest.mark.usefixtures("four_gpus")
def test_a_machine_with_gpus_uses_them_all_unless_told_otherwise() -> None:
    assert make_plan(config(4)) == Plan({"localhost": [0, 1, 2, 3]}, "cuda")
    assert make_plan(config(2, num_gpus=2)) == Plan({"localhost": [0, 1]}, "cuda")
    assert make_plan(config(2, include="localhost:1,3")) == Plan({"localhost": [1, 3]}, "cuda")
    with pytest.raises(
        ConfigError, match=r"num_gpus is 8, but localhost has 4.*runs it on the CPU"
    ):
        make_plan(config(8, num_gpus=8))


@pytest.mark.usefixtures("four_gpus")
def test_what_there_is_on_a_machine_with_gpus(tmp_path: Path) -> None:
    assert find_devices(config()).slots == (4,)
    assert find_devices(config(num_gpus=3)).slots == (3,)
    assert find_devices(config(include="localhost:1,3")).slots == (2,)
    (tmp_path / "one").write_text("localhost slots=1\n")
    assert find_devices(config(hostfile=str(tmp_path / "one"))).slots == (1,)
    (tmp_path / "two").write_text("a slots=2\nb slots=4\n")
    there = find_devices(config(hostfile=str(tmp_path / "two")))
    assert (there.slots, there.all_start) == ((2, 4), True)


@pytest.mark.usefixtures("no_cuda")
def test_what_there_is_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "cores", lambda: 6)
    assert find_devices(config()) == Devices((), 6)
    assert find_devices(config(num_gpus=3)) == Devices((3,), 6)
    (tmp_path / "three").write_text("localhost slots=3\n")
    assert find_devices(config(hostfile=str(tmp_path / "three"))) == Devices((3,), 6)


@pytest.mark.usefixtures("four_gpus")
def test_devices_that_the_grid_leaves_over_are_not_used(tmp_path: Path) -> None:
    wide = {"model_parallel_size": 2}
    assert make_plan(config(2, num_gpus=3, **wide)) == Plan({"localhost": [0, 1]}, "cuda")
    assert make_plan(config(2, include="localhost:1,2,3", **wide)).hosts == {"localhost": [1, 2]}
    (tmp_path / "three").write_text("localhost slots=3\n")
    plan = make_plan(config(2, hostfile=str(tmp_path / "three"), **wide))
    assert (plan.hosts, plan.world_size) == ({"localhost": [0, 1]}, 2)


def dry_run(
    folder: Path, script: str, grid: str, capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """The lines in front of a dry run's table, and the table."""
    values = MODEL | {"load": "nowhere", "tokenizer_type": "CharLevelTokenizer"}
    (folder / "model.yml").write_text(
        "".join(f"{key}: {value}\n" for key, value in values.items()) + grid
    )
    assert main([script, str(folder / "model.yml"), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith("grid:")]
    return notes, {line.split()[0]: line.split()[1:] for line in lines if line not in notes}


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("script", ["generate.py", "evaluate.py"])
def test_a_dry_run_shows_the_grid_that_fits_the_gpus(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = "model_parallel_size: 2\npipe_parallel_size: 4\n"
    notes, rows = dry_run(tmp_path, script, grid, capsys)
    assert notes == [
        "grid: tp 2 x pp 4 (model.yml:8) needs 8 devices and there are 4: using tp 2 x pp 2"
    ]
    assert rows["model_parallel_size"] == ["2", "model.yml:8"]
    assert rows["pipe_parallel_size"] == ["2", "fitted"]
    assert rows["world_size"] == ["4", "derived"]


@pytest.mark.usefixtures("four_gpus")
def test_a_dry_run_of_training_explains_a_grid_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.yml").write_text(
        "".join(f"{key}: {value}\n" for key, value in MODEL.items())
        + "model_parallel_size: 2\npipe_parallel_size: 4\ndata_path: d\ntrain_iters: 1\n"
        + "optimizer: {params: {lr: 0.1}}\ntokenizer_type: CharLevelTokenizer\n"
    )
    assert main(["train.py", str(tmp_path / "model.yml"), "--dry_run"]) == 2
    assert capsys.readouterr().err.endswith(
        "= 8. Use 8 processes, or, for 4, model_parallel_size: 2 and pipe_parallel_size: 2.\n"
    )


@pytest.mark.usefixtures("no_cuda")
def test_a_hostfile_that_names_this_machine_alone_stays_here(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=4\n")
    assert make_plan(config(4, hostfile=str(hostfile))) == Plan({"localhost": [0, 1, 2, 3]}, "cpu")
    hostfile.write_text("far slots=4\n")
    assert make_plan(config(4, hostfile=str(hostfile))).launcher == "pdsh"


@pytest.mark.usefixtures("no_cuda")
def test_the_hostfile_may_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\nb slots=2\n")
    with pytest.raises(ConfigError, match="other hosts do not know this one as localhost"):
        make_plan(config(4, hostfile=str(tmp_path / "hosts")))
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    monkeypatch.setenv("DLTS_HOSTFILE", str(tmp_path / "hosts"))
    plan = make_plan(config(4))
    assert plan == Plan({"a": [0, 1], "b": [0, 1]}, None, "pdsh")
    assert plan.world_size == 4
    monkeypatch.setenv("DLTS_HOSTFILE", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"missing .*is not a file; unset DLTS_HOSTFILE"):
        make_plan(config())
    with pytest.raises(ConfigError, match=r"is not a file; .* --set hostfile=null"):
        make_plan(config(hostfile=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=2\nb 3\n", ":2: 'b 3' is not of the form"),
        ("a slots=2\na slots=2\n", ":2: host a is listed twice"),
        ("# nothing\n\n", "lists no slots"),
        ("localhost slots=0\n", "lists no slots"),
        ("a slots=10000\n", ":1: 'a slots=10000' is not of the form .* N up to 9999"),
        ("-oProxyCommand=reboot slots=1\n", ":1: '-oProxyCommand=reboot' is not the name"),
        ("n[1-2] slots=1\n", r"'n\[1-2\]' is not the name .* writes node\[01-12\] out"),
        ("a,b slots=1\n", "'a,b' is not the name"),
        ("me@a slots=1\n", "'me@a' is not the name"),
        ("$(reboot) slots=1\n", "is not the name"),
        ("# H\udcf6st\na slots=1\n", "hosts cannot be read as text: 'utf-8' codec"),
    ],
)
def test_a_broken_hostfile_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hosts")


def test_a_hostfile_of_another_system(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("\ufeffa.b slots=1\r\n\r\n10.0.0.1 slots=2 # two\r\n")
    assert read_hostfile(tmp_path / "hosts") == {"a.b": [0], "10.0.0.1": [0, 1]}


HOSTS = {"a": [0, 1, 2], "b": [0, 1, 2]}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, HOSTS),
        ({"num_nodes": 1}, {"a": [0, 1, 2]}),
        ({"num_gpus": 2}, {"a": [0, 1], "b": [0, 1]}),
        ({"include": "b@a:2,0"}, {"a": [0, 2], "b": [0, 1, 2]}),
        ({"exclude": "a@b:1"}, {"b": [0, 2]}),
    ],
)
def test_filters_are_deepspeeds(keys: dict[str, Any], expected: dict[str, list[int]]) -> None:
    assert select(HOSTS, config(**keys)) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"include": "c"}, "include: c: there is no host c; there are a, b"),
        ({"exclude": "a:5"}, r"a has no slot 5; its slots are \[0, 1, 2\]"),
        ({"include": "a:x"}, "slots are numbers"),
        ({"exclude": "a@b"}, "leaves nothing"),
        ({"num_gpus": 4}, "num_gpus is 4, but a has 3"),
        ({"num_nodes": 3}, "num_nodes is 3, but there are 2 hosts: a, b"),
    ],
)
def test_a_wrong_filter_is_explained(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(HOSTS, config(**keys))


def test_a_host_without_slots_takes_no_part() -> None:
    hosts = {"a": [], "b": [0]}  # its first would be told to the ranks as the host of rank 0
    for keys in ({}, {"num_nodes": 1}, {"include": "b"}):
        assert select(hosts, config(**keys)) == {"b": [0]}
    with pytest.raises(ConfigError, match="there is no host a; there are b"):
        select(hosts, config(include="a"))


def test_no_visible_device_means_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_devices() == []


JOB = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.usefixtures("no_cuda")
def test_the_hosts_of_a_slurm_job_are_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    slots = {"n1": [0, 1], "n2": [0, 1]}
    assert make_plan(config(4, launcher="slurm")) == Plan(slots, None, "slurm")
    assert make_plan(config(2, launcher="slurm", num_gpus=1)).hosts == {"n1": [0], "n2": [0]}
    assert make_plan(config(2, launcher="slurm", include="n2")).hosts == {"n2": [0, 1]}
    assert make_plan(config()).launcher is None  # the job is nothing to another launcher
    with pytest.raises(ConfigError, match="num_gpus is 8, but n1 has 2; ask Slurm for them"):
        make_plan(config(16, launcher="slurm", num_gpus=8))


@pytest.mark.parametrize(
    ("gpus", "slots"),
    [
        ({"SLURM_GPUS_PER_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "a100:3"}, 3),
        ({"SLURM_GPUS_ON_NODE": "5"}, 5),
        ({"SLURM_GPUS_ON_NODE": "0"}, 2),
    ],
)
def test_a_slurm_node_has_as_many_slots_as_gpus_else_tasks(gpus: dict, slots: int) -> None:
    assert slurm_hosts(JOB | gpus) == {"n1": list(range(slots)), "n2": list(range(slots))}


def test_a_step_that_tells_of_its_own_tasks_is_explained() -> None:
    with pytest.raises(
        ConfigError, match=r"SLURM_TASKS_PER_NODE is 1, .* the 2 hosts .* n\[1-2\];"
    ):
        slurm_hosts(JOB | {"SLURM_TASKS_PER_NODE": "1"})


@pytest.mark.usefixtures("no_cuda")
def test_force_multi_uses_the_launcher_for_this_machine(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    given = {"hostfile": str(tmp_path / "hosts"), "force_multi": True, "launcher": "openmpi"}
    assert make_plan(config(2, **given)) == Plan({"localhost": [0, 1]}, None, "openmpi")
    with pytest.raises(ConfigError, match="force_multi is set, but no hostfile"):
        make_plan(config(force_multi=True))
