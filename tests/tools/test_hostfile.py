"""tools/hostfile.py: hosts of a job, of files, of names."""

from __future__ import annotations

from pathlib import Path

import pytest

from neox.cluster.hosts import read_hostfile
from neox.errors import ConfigError
from tools.hostfile import find_hosts, main


def test_what_it_prints_is_a_hostfile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a", "node[01-02]", "--slots", "2"]) == 0
    (tmp_path / "hosts").write_text(capsys.readouterr().out)
    assert read_hostfile(tmp_path / "hosts") == {"a": [0, 1], "node01": [0, 1], "node02": [0, 1]}
    assert main(["a"]) == 2
    assert "nothing tells how many slots a has; give --slots N" in capsys.readouterr().err


def test_jobs_tell_their_hosts(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "3,1"}
    assert find_hosts([], None, slurm) == {"n1": 3, "n2": 1}
    assert find_hosts([], None, {"LSB_MCPU_HOSTS": "x 4 y 2"}) == {"x": 4, "y": 2}
    (tmp_path / "nodes").write_text("p\np\nq\n")
    for name in ("PBS_NODEFILE", "LSB_DJOB_HOSTFILE"):
        assert find_hosts([], None, {name: str(tmp_path / "nodes")}) == {"p": 2, "q": 1}
    with pytest.raises(ConfigError, match="no host is named"):
        find_hosts([], None, {})


def test_hosts_of_a_file_and_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list").write_text("# ours\nw-[0-1]\nlast slots=4\n")
    assert list(find_hosts([], tmp_path / "list", {})) == ["w-0", "w-1", "last"]
    (tmp_path / "folder").mkdir()
    for name in ("worker-1", "worker-0", "..data"):
        (tmp_path / "folder" / name).touch()
    assert list(find_hosts([], tmp_path / "folder", {})) == ["worker-0", "worker-1"]
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        find_hosts([], tmp_path / "none", {})
    with pytest.raises(ConfigError, match=r"cannot be read as text: .*No such file"):
        find_hosts([], None, {"PBS_NODEFILE": str(tmp_path / "none")})
    (tmp_path / "list").write_text("# nobody\n")
    assert main(["--hosts", str(tmp_path / "list"), "--slots", "2"]) == 2
    assert "list names no host" in capsys.readouterr().err
