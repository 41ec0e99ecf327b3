"""Whether hosts can be reached and see what a run needs: asked of all at once, before it starts."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from neox.cluster.run_folder import START
from neox.errors import ConfigError

CONNECT_S = 5
ANSWER_S = 20.0

# Asked of a host in this order; what it answers, and what is wrong then.
_CHECKS = (
    ("folder", "cd {cwd}", "has no folder {cwd}: start the run in a folder that all hosts share"),
    (
        "shared",
        "test -e {run}",
        "has another folder {cwd} than this host: start the run in one that all hosts share",
    ),
    ("readable", f"cat {{run}}/{START}", "may not read {run}: the same user must run on all hosts"),
    (
        "python",
        "test -x {python}",
        "has no {python}: make the virtual environment on a file system that all hosts share, or "
        "at this path on each",
    ),
    ("starts", "{python} -c pass", "has a {python} that does not start"),
)


def check_hosts(hosts: Iterable[str], run: Path) -> None:
    """Raise ConfigError naming every host that ssh does not reach, or that lacks what is here."""
    words = {"cwd": os.getcwd(), "run": str(run), "python": sys.executable}
    quoted = {name: shlex.quote(word) for name, word in words.items()}
    script = "\n".join(
        f"{test.format(**quoted)} >/dev/null 2>&1 || {{ echo neox:{name}; exit 0; }}"
        for name, test, _ in _CHECKS
    )
    script += "\necho neox:good\n"
    asked = {host: _ask(host) for host in hosts}
    problems, deadline = [], time.monotonic() + ANSWER_S
    for host, process in asked.items():
        try:
            left = max(deadline - time.monotonic(), 0.1)
            said, errors = process.communicate(script, timeout=left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            problems.append(f"{host}: ssh gave no answer within {ANSWER_S:g} s")
            continue
        # A host's shell may greet before, and its ssh warn.
        answers = [line.partition(":")[2] for line in said.splitlines() if line.startswith("neox:")]
        if not answers:
            last = (errors.strip().splitlines() or [f"status {process.returncode}"])[-1].strip()
            problems.append(f"{host}: ssh does not get there: {last}")
        for name, _, problem in _CHECKS:
            if name in answers:
                problems.append(f"{host} {problem.format(**words)}")
    if problems:
        raise ConfigError(
            "\n  ".join(["not every host can run this:", *problems])
            + "\ntry: ssh HOST true   (no_ssh_check: true leaves this check out)"
        )


def _ask(host: str) -> subprocess.Popen[str]:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"]
    try:
        return subprocess.Popen(
            ["ssh", *options, host, "/bin/sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except FileNotFoundError:
        raise ConfigError(
            "there is no ssh here; on Debian and Ubuntu: apt-get install openssh-client"
        ) from None
