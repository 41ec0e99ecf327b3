"""The command that starts the ranks: DeepSpeed's launcher, behind pdsh, or srun or an mpirun.

On one machine it is DeepSpeed's per-host part alone: the runner in front of it would import torch
once more (two seconds) to start this very command, and report a kill of it as success.

Over several hosts DeepSpeed's runners are not used, for they

- write every variable of the environment, secrets too, on command lines that all users can read;
- choose the order of hosts and of ranks on them (srun, mpirun), so that rank 0 may be elsewhere
  than master_addr; demand as many slots on every host (mpich, impi, mvapich, slurm) and know
  nothing of include and exclude (openmpi, mpich, impi, mvapich);
- tell openmpi to use an interface that must be called eth0;
- print each host's name before each line, and import torch before anything else.

So each launcher has one command here, which starts every rank where the plan says; its environment
comes from a file (neox.cluster.environment).
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from neox.cluster.hosts import Slots
from neox.cluster.run_folder import NOISE, START, Job
from neox.config import NeoXConfig
from neox.errors import ConfigError

WORKER = Path(__file__).with_name("worker.py")
SSH_LAUNCHERS = ("pdsh", "openmpi", "mpich", "mvapich", "impi")


def local_command(hosts: Slots, job: Job, node: str | None = None) -> list[str]:
    """DeepSpeed's launcher of the ranks of one host, up to the script; `node` is its number."""
    world = base64.urlsafe_b64encode(json.dumps(hosts).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += [] if node is None else [f"--node_rank={node}"]
    command += ["--no_local_rank", "--log_level", "critical"]  # its errors, too, we say better
    return [*command, "--master_addr", job.master_addr, "--master_port", str(job.master_port)]


def command_over_hosts(hosts: Slots, job: Job, config: NeoXConfig, folder: Path) -> list[str]:
    """The command that starts rank after rank over `hosts`, in their order.

    What the launcher says of itself goes to NOISE, and rank 0 has its standard output alone.
    Writes files into `folder`. Raises ConfigError for a launcher that is not installed.
    """
    tasks = [host for host, slots in hosts.items() for _ in slots]
    file = folder / "tasks"
    file.write_text("".join(f"{host}\n" for host in tasks))
    program = find_program(config.launcher)
    begin = ["/bin/sh", str(folder / START)]
    worker = [sys.executable, "-u", str(WORKER), str(folder)]
    if config.launcher == "pdsh":
        # pdsh puts the number of a host in its list for %n. -N: without names before lines.
        launch = local_command(hosts, job, node="%n") + worker[2:]
        every = ["-S", "-N", "-f", str(len(hosts)), "-R", "ssh", "-w", ",".join(hosts)]
        command = [program, *every, shlex.join([*begin, *launch])]
    elif config.launcher == "slurm":
        name = f"--job-name={folder.name}"  # by which it is cancelled: neox.cluster.allocation
        options = _srun_options(config, file, len(tasks), len(hosts))
        command = [program, name, *options, *begin, *worker]
    elif config.launcher == "openmpi":
        # seq: rank N runs on the file's line N. Threads bind themselves.
        place = ["-n", str(len(tasks)), "--hostfile", str(file), "--map-by", "seq"]
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        command = [program, *root, *place, "--bind-to", "none", *begin, *worker]
    else:  # hydra, which MPICH, MVAPICH and Intel MPI have in common
        place = ["-n", str(len(tasks)), "-launcher", "ssh", "-hosts"]
        place.append(",".join(f"{host}:{len(slots)}" for host, slots in hosts.items()))
        if config.launcher != "impi":  # it would print on our standard output what it cleans up
            place.append("-disable-auto-cleanup")
        command = [program, *place, *begin, *worker]
    quiet = 'log=$1; shift; exec "$@" </dev/null 2>"$log"'
    return ["/bin/sh", "-c", quiet, "sh", str(folder / NOISE), *command]


def _srun_options(config: NeoXConfig, tasks: Path, processes: int, hosts: int) -> list[str]:
    """arbitrary: task N runs on the file's line N. It shares the job's hosts with the shell that we
    run in, and every task may use all of the cores, which threads divide among themselves."""
    options = [f"--nodelist={tasks}", "--distribution=arbitrary"]
    options += [f"--nodes={hosts}", f"--ntasks={processes}"]
    options += ["--overlap", "--cpu-bind=none", "--mpi=none", "--export=ALL"]
    options += ["--unbuffered", "--kill-on-bad-exit=1"]
    given = {"account": config.account, "comment": config.comment}
    return options + [f"--{name}={value}" for name, value in given.items() if value]


# launcher -> the programs to try, what their --version says, and where to get one
_MPI = {
    "openmpi": (["mpirun.openmpi", "mpirun"], ("Open MPI", "OpenRTE"), "openmpi-bin"),
    "mpich": (["mpirun.mpich", "mpiexec.hydra", "mpirun"], ("HYDRA",), "mpich"),
    "mvapich": (["mpiexec.hydra", "mpirun"], ("HYDRA",), ""),
    "impi": (["mpiexec.hydra", "mpirun"], ("Intel",), ""),
}
_PACKAGES = {"pdsh": ("pdsh", "pdsh"), "slurm": ("srun", "slurm-client")}


def find_program(launcher: str) -> str:
    """The path of a launcher's program. ConfigError where it is not there, or is another's."""
    if launcher in _PACKAGES:
        name, package = _PACKAGES[launcher]
        path = shutil.which(name)
        if path is None:
            raise ConfigError(
                f"launcher: {launcher} needs the program {name}, which is not here; on Debian and "
                f"Ubuntu: apt-get install {package}"
            )
        return path
    names, words, package = _MPI[launcher]
    others = []
    for name in names:
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            if any(word in said for word in words):
                return path
            others.append(f"{path} is {(said.splitlines() or ['silent'])[0]!r}")
    install = f"; on Debian and Ubuntu: apt-get install {package}" if package else ""
    raise ConfigError(
        f"launcher: {launcher} needs its {names[-1]}, which is not here"
        + (f" ({', '.join(others)})" if others else "")
        + install
    )
