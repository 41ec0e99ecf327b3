"""deepy.py as a door: what it needs, what it imports, what it says before anything runs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DEEPY = REPOSITORY / "deepy.py"
MODEL = """\
# a comment
{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16,
 "max_position_embeddings": 16, "tokenizer_type": "CharLevelTokenizer", "load": "nowhere"}
"""


def deepy(*arguments: str | Path, folder: Path, python: tuple[str, ...] = (sys.executable,)):
    return subprocess.run(
        [*python, DEEPY, *arguments],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_dry_run_tells_each_values_origin(tmp_path: Path) -> None:
    (tmp_path / "model.yml").write_text(MODEL)
    given = ("-o", "out.jsonl", "--set", "temperature=0.5")
    run = deepy("generate.py", "model.yml", *given, "--dry_run", folder=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()}
    assert rows["num_layers"] == ["2", "model.yml:2"]
    assert rows["sample_output_file"] == ['"out.jsonl"', "-o"]
    assert rows["temperature"] == ["0.5", "--set"]
    assert rows["norm"] == ['"layernorm"', "default"]
    assert rows["world_size"] == ["1", "derived"]


def test_a_closed_pipe_ends_it_quietly(tmp_path: Path) -> None:
    (tmp_path / "model.yml").write_text(MODEL)
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, DEEPY, "generate.py", "model.yml", "--dry_run"],
        cwd=tmp_path,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


def test_ctrl_c_during_the_imports_shows_no_traceback(tmp_path: Path) -> None:
    copy = Path(shutil.copy(DEEPY, tmp_path))
    package = tmp_path / "neox" / "cluster"
    package.mkdir(parents=True)
    (package / "main.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    run = subprocess.run([sys.executable, copy, "train.py"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (-signal.SIGINT, "")


def test_a_dry_run_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "model.yml").write_text(MODEL)
    command = ["deepy.py", "generate.py", str(tmp_path / "model.yml"), "--dry_run"]
    program = f"""
import runpy, sys
sys.argv = {command!r}
try:
    runpy.run_path({str(DEEPY)!r}, run_name="__main__")
except SystemExit as end:
    heavy = {{"torch", "numpy", "deepspeed"}} & set(sys.modules)
    sys.exit(f"{{end.code}} {{heavy}}" if end.code or heavy else 0)
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_a_dry_run_does_without_the_hostfile_that_a_run_needs(tmp_path: Path) -> None:
    (tmp_path / "model.yml").write_text(MODEL)
    command = ("generate.py", "model.yml", "-H", "elsewhere", "--set", "model_parallel_size=2")
    run = deepy(*command, "--dry_run", folder=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()}
    assert rows["hostfile"] == ['"elsewhere"', "-H"]
    assert rows["world_size"] == ["2", "derived"]
    run = deepy(*command, folder=tmp_path)
    assert run.returncode == 2 and "hostfile elsewhere (-H) is not a file" in run.stderr


def test_usage_errors_are_one_line_and_exit_2(tmp_path: Path) -> None:
    for command in (["trian.py"], ["train.py", "--iteratoin", "3"], ["train.py", "missing.yml"]):
        run = deepy(*command, folder=tmp_path)
        assert (run.returncode, run.stdout) == (2, "")
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


def test_no_configuration_means_the_20b_and_says_so(tmp_path: Path) -> None:
    run = deepy("generate.py", "--dry_run", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    first, *table = run.stdout.splitlines()
    assert first == "no configuration file given: using configs/20B.yml"
    assert any(line.split()[:2] == ["hidden_size", "6144"] for line in table)


def test_it_starts_from_anywhere_without_naming_python(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        [DEEPY, "--version"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stdout.startswith("neox ")


BARE = (sys.executable, "-S")  # without site-packages: a system's Python


def test_a_bare_python_continues_in_the_projects_environment(tmp_path: Path) -> None:
    copy = Path(shutil.copy(DEEPY, tmp_path))
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "in .venv: $@"\n')
    python.chmod(0o755)
    run = subprocess.run([*BARE, copy, "train.py", "a b"], capture_output=True, text=True)
    assert run.stdout == f"in .venv: {copy} train.py a b\n"


def test_a_bare_python_without_an_environment_says_what_to_run(tmp_path: Path) -> None:
    copy = Path(shutil.copy(DEEPY, tmp_path))
    run = subprocess.run([*BARE, copy, "train.py"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ") and run.stderr.endswith("run: make install\n")
    assert run.stderr.count("\n") == 1
