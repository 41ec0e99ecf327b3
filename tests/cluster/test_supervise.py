"""What the supervisor makes of launchers and ranks that behave badly; small scripts play both."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neox.cluster.ranks import Rank, Trouble
from neox.cluster.run_folder import Job, RunFolder
from neox.cluster.supervise import supervise
from neox.config import from_dict
from tests.terminal import Person

REPOSITORY = Path(__file__).parents[2]

# A launcher that looks after its one process once a second, as DeepSpeed's does. The process is a
# keeper, and its child a rank that runs a test's body; `end(rank, status, ...)` are the last words
# of any rank. Of others than its own this process becomes the keeper, at `meet(rank)` or else then.
# It answers deepy.py, which waits for that, only once it has said them.
LAUNCHER = """
import dataclasses, json, mmap, os, signal, subprocess, sys, threading, time
from pathlib import Path
from neox import progress
from neox.cluster.control import Address, connect
from neox.cluster.keeper import Keeper
from neox.cluster.run_folder import End, RunFolder

folder = RunFolder(Path(sys.argv[1]))
rank = int(sys.argv[2])
lines = {}

def answer(line):
    while line.is_open:
        for message in line.receive():
            if "beat" in message:
                line.send(state={"process": "S", "idle": 0.0})
        time.sleep(0.01)

def meet(number):
    lines[number] = connect(Address.read(folder.path), number, os.getpid())

def end(number, status, **words):
    if number == rank:
        os.write(mouth, json.dumps(dataclasses.asdict(End(status, **words))).encode() + b"\\n")
        return
    if number not in lines:
        meet(number)
    lines[number].send(end=dataclasses.asdict(End(status, **words)))
    threading.Thread(target=answer, args=(lines[number],), daemon=True).start()

supervisor = os.getppid()
if os.fork():
    while os.waitpid(-1, os.WNOHANG) == (0, 0):
        time.sleep(1)
    sys.exit()
page = progress.Page(mmap.mmap(-1, progress.SIZE))
words, mouth = os.pipe()
pid = os.fork()
if pid:
    os.close(mouth)
    os._exit(Keeper(folder, rank, pid, page, words, os.memfd_create("stacks")).run())
os.close(words)
progress.use(page)
"""


def supervise_script(parent: Path, body: str, world_size: int = 1, rank: int = 0) -> int:
    """The exit status of a run in `parent` whose rank `rank` runs `body`."""
    config = from_dict(
        {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": 16,
            "max_position_embeddings": 16,
        }
    )
    job = Job("train", None, "cpu", world_size, "127.0.0.1", 29500, "here")
    folder = RunFolder.create(job, config, parent=parent)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", LAUNCHER + body, str(folder.path), str(rank)]
    return supervise(command, environment, folder, world_size).status


@pytest.fixture
def run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """run(body, world_size, rank) -> (exit status, what was printed as the reason)"""

    def begin(body: str, world_size: int = 1, rank: int = 0) -> tuple[int, str]:
        status = supervise_script(tmp_path, body, world_size, rank)
        return status, capfd.readouterr().err

    # Under nohup it is ignored, and so it would be by what is tested.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield begin
    signal.signal(signal.SIGHUP, before)


def test_success_is_every_ranks_word(run: Callable[..., tuple[int, str]]) -> None:
    assert run("end(0, 0)") == (0, "")
    status, reason = run("end(0, 0)", 3)
    assert status == 1
    assert reason.startswith("error: the launcher ended with status 0")
    assert reason.endswith("ranks not yet done: 1, 2\n")


def test_a_good_word_followed_by_a_bad_end_is_a_failure(
    run: Callable[..., tuple[int, str]],
) -> None:
    status, reason = run("end(0, 0); os.kill(os.getpid(), signal.SIGSEGV)")
    assert status == 128 + signal.SIGSEGV
    assert "rank 0" in reason and "was killed by signal 11 (SIGSEGV)" in reason


def test_a_silent_death_outranks_the_errors_that_follow_from_it(
    run: Callable[..., tuple[int, str]],
) -> None:
    status, reason = run("end(1, 1, message='connection closed'); os._exit(7)", 2)
    assert status == 7
    assert "rank 0" in reason and "ended with status 7" in reason and "closed" not in reason


def test_the_lowest_ranks_error_is_shown_and_once(run: Callable[..., tuple[int, str]]) -> None:
    body = """
for number in (1, 2, 3):
    meet(number)
end(2, 2, error=True, message="two")
end(1, 2, error=True, message="one")
end(3, 1, message="Traceback")
time.sleep(60)
"""
    assert run(body, 4) == (2, "error: one\n")


def test_the_first_traceback_is_shown(
    run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noticed = tmp_path / "noticed"
    trouble = Rank.trouble

    def notice(rank: Rank, now: float) -> Trouble | None:
        found = trouble(rank, now)
        if rank.number == 1 and found:
            noticed.touch()
        return found

    monkeypatch.setattr(Rank, "trouble", notice)
    body = f"""
end(1, 1, message="Traceback of the cause")
while not os.path.exists({str(noticed)!r}):
    time.sleep(0.01)
end(0, 1, message="Traceback of the consequence")
time.sleep(60)
"""
    assert run(body, 2) == (1, "rank 1 of 2 failed:\nTraceback of the cause\n")


def test_what_leaves_the_session_is_ended_too(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    stray = f"import os, signal, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()))"
    stray += "; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    body = f"""
subprocess.Popen([sys.executable, "-c", {stray!r}], start_new_session=True)
while not os.path.exists({str(pid_file)!r}) or not os.path.getsize({str(pid_file)!r}):
    time.sleep(0.01)
end(0, 3)
time.sleep(60)
"""
    status, reason = run(body)
    assert (status, reason) == (3, "error: rank 0 left with status 3\n")
    # It has lost its memory; its last steps to a zombie may be yet to come.
    stat, deadline = Path(f"/proc/{pid_file.read_text()}/stat"), time.monotonic() + 5
    with contextlib.suppress(OSError):  # it is gone
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline


def test_a_deaf_job_is_stopped_all_the_same(run: Callable[..., tuple[int, str]]) -> None:
    body = """
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.kill(supervisor, signal.SIGHUP)
time.sleep(60)
"""
    started = time.monotonic()
    status, reason = run(body)
    assert (status, reason) == (128 + signal.SIGHUP, "stopped by SIGHUP\n")
    assert time.monotonic() - started < 20


def test_ranks_get_time_to_act_on_a_request_to_stop(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    body = f"""
try:
    os.kill(supervisor, signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.3)
    Path({str(saved)!r}).touch()
"""
    status, _ = run(body)
    assert status == 130 and saved.exists()


def test_ranks_that_end_well_when_asked_to_stop_are_a_success(
    run: Callable[..., tuple[int, str]],
) -> None:
    body = """
signal.signal(signal.SIGTERM, lambda number, frame: (end(rank, 0), sys.exit(0)))
os.kill(supervisor, signal.SIGTERM)
while True:
    signal.pause()
"""
    assert run(body) == (0, "")
    assert run(body, 2) == (143, "stopped by SIGTERM\n")  # the other has not said so


def test_ctrl_c_is_rank_0s_while_it_claims_it_and_ctrl_z_nobodys(
    run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    got = tmp_path / "got"
    body = f"""
from neox.cluster.run_folder import claim_interrupts
claim_interrupts(True)
def naps():
    status = Path(f"/proc/{{supervisor}}/status").read_text()
    return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])
before, deadline = naps(), time.monotonic() + 20
os.kill(supervisor, signal.SIGTSTP)
while naps() < before + 2:  # it has been awake in between, and has dealt with the signal
    if time.monotonic() > deadline:
        os.kill(supervisor, signal.SIGCONT)
        sys.exit(3)
try:
    os.kill(supervisor, signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    Path({str(got)!r}).write_text(Path(f"/proc/{{supervisor}}/stat").read_text())
claim_interrupts(False)
try:
    os.kill(supervisor, signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit()
"""
    assert run(body) == (130, "stopped by SIGINT\n")
    assert got.read_text().rpartition(") ")[2][0] != "T"


def test_a_killed_rank_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    body = """
import termios
settings = termios.tcgetattr(0)
settings[3] &= ~termios.ECHO
termios.tcsetattr(0, termios.TCSANOW, settings)
os.kill(os.getpid(), signal.SIGKILL)
"""
    script = "import sys; from pathlib import Path; from tests.cluster.test_supervise import *\n"
    script += f"sys.exit(supervise_script(Path({str(tmp_path)!r}), {body!r}))"
    person = Person([sys.executable, "-c", script], REPOSITORY, {})
    assert person.leaves() == 137  # asserts that it has an echo
    person.close()


def test_the_end_of_a_killed_rank_is_shown_with_its_last_output(
    run: Callable[..., tuple[int, str]],
) -> None:
    body = """
folder.log(1, "here").write_text("".join(f"line {i}\\n" for i in range(100)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    status, reason = run(body, 2, rank=1)
    lines = reason.splitlines()
    assert status == 137
    assert lines[-2] == "line 99" and "line 0" not in lines
    assert lines[-1].startswith("error: rank 1 (pid ")
