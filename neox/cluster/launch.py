"""Decide which processes a run has and start them: one in place, several through DeepSpeed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from neox import log
from neox.cluster.execute import Place, execute, prepare_environment
from neox.cluster.hosts import Slots, cores, cuda_devices, find_hostfile, read_hostfile, select
from neox.cluster.restarts import run
from neox.cluster.run_folder import Job, RunFolder
from neox.cluster.supervise import GRACE_S, Outcome, supervise
from neox.config import Devices, NeoXConfig
from neox.errors import ConfigError

_WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Plan:
    """The processes of a run: their hosts and slots, and what they compute on."""

    hosts: Slots
    device: str | None  # "cpu", "cuda", or None: each host decides for itself
    hostfile: Path | None = None  # of a run through ssh, MPI or Slurm

    @property
    def world_size(self) -> int:
        return sum(len(slots) for slots in self.hosts.values())


def find_devices(config: NeoXConfig) -> Devices:
    """What there is for a run of `config`, whose sizes need not be settled yet.

    Raises ConfigError for hosts or devices that are named and are not there.
    """
    there = _look_around(config)
    slots = tuple(len(slots) for slots in there.hosts.values())
    return Devices(slots if any(slots) else (), cores(), all_start=there.hostfile is not None)


def make_plan(config: NeoXConfig) -> Plan:
    """Which processes to start: config.world_size of them, whichever of the devices come first.

    Raises ConfigError for hosts or devices that are named and are not there.
    """
    there = _look_around(config)
    if there.hostfile is not None:
        return there
    (slots,) = there.hosts.values()
    slots = (slots or list(range(config.world_size)))[: config.world_size]
    return Plan({"localhost": slots}, there.device)


def _look_around(config: NeoXConfig) -> Plan:
    """Every slot that there is.

    Hosts come from the hostfile. Without one, this machine has as many slots as visible CUDA
    devices; without those, num_gpus on the CPU, or none that are numbered: [].
    """
    hostfile = find_hostfile(config)
    slots = None
    if hostfile is not None:
        hosts = select(read_hostfile(hostfile), config)
        here = {"localhost", "127.0.0.1", socket.gethostname()}
        if config.force_multi or len(hosts) > 1 or not here.issuperset(hosts):
            return Plan(hosts, None, hostfile)
        (slots,) = hosts.values()
    elif config.num_nodes > 1:
        raise ConfigError(
            f"num_nodes is {config.num_nodes}, but no hostfile names the hosts; give one with -H"
        )
    devices = cuda_devices()
    if not devices:
        return Plan({"localhost": slots or list(range(config.num_gpus or 0))}, "cpu")
    if slots is None:
        (slots,) = select({"localhost": devices}, config).values()
    if not set(slots) <= set(devices):
        raise ConfigError(f"{hostfile}: slots {slots}, but the CUDA devices here are {devices}")
    return Plan({"localhost": slots}, "cuda")


def launch(entry_point: str | None, script: Path | None, config: NeoXConfig, plan: Plan) -> int:
    """Run an entry point, or the user's script, on every process of the plan.

    Returns the exit status. A NeoXError of a process that ran in place is raised here; one of
    several processes has been printed.
    """
    several_hosts = plan.hostfile is not None
    if plan.world_size > 1 and plan.device == "cpu" and config.distributed_backend == "nccl":
        log.info(f"no CUDA device: {plan.world_size} processes on the CPU, gloo instead of nccl")
    # What else there is has nothing to go on from.
    restarts = config.restarts if entry_point in ("train", None) else 0
    if plan.world_size == 1 and not several_hosts and not restarts:
        return _run_in_place(_job(entry_point, script, config, plan), config, plan)

    def attempt(config: NeoXConfig, extra: Mapping[str, str]) -> Outcome:
        job = _job(entry_point, script, config, plan)
        # The other hosts see the current folder, not this machine's /tmp.
        folder = RunFolder.create(job, config, parent=Path.cwd() if several_hosts else None)
        try:
            command = [*deepspeed_command(plan, job, config), str(_WORKER), str(folder.path)]
            return supervise(
                command,
                {**_launcher_environment(job), **extra},
                folder,
                plan.world_size,
                hosts=plan.hosts if several_hosts else (),
                grace_s=_grace(entry_point, config),
                watchdog_s=config.watchdog_timeout if entry_point == "train" else 0.0,
            )
        finally:
            folder.remove()

    return run(config, attempt, restarts)


def _job(entry_point: str | None, script: Path | None, config: NeoXConfig, plan: Plan) -> Job:
    several_hosts = plan.hostfile is not None
    return Job(
        entry_point=entry_point,
        script=None if script is None else str(script),
        device=plan.device,
        world_size=plan.world_size,
        master_addr=config.master_addr
        or (next(iter(plan.hosts)) if several_hosts else "127.0.0.1"),
        master_port=config.master_port if several_hosts else _choose_port(config),
        host=socket.gethostname(),
        log_dir=config.log_dir,
    )


def _grace(entry_point: str | None, config: NeoXConfig) -> float:
    """A server's running requests have theirs, and then it takes a forward pass to end."""
    return GRACE_S + (config.serve_grace + 10.0 if entry_point == "serve" else 0.0)


def _run_in_place(job: Job, config: NeoXConfig, plan: Plan) -> int:
    # Set even where the shell started us with SIGINT ignored, as it does for background jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _exit_by_signal)
    if plan.device == "cuda":  # as DeepSpeed's launcher does for each of several
        os.environ["CUDA_VISIBLE_DEVICES"] = str(plan.hosts["localhost"][0])
    prepare_environment(job, Place())
    if job.script is None:
        execute(job, config, None, Place())
        return 0
    with tempfile.NamedTemporaryFile("w", prefix="neox-config-", suffix=".json") as file:
        file.write(config.encode())
        file.flush()
        execute(job, config, Path(file.name), Place())
    return 0


def _exit_by_signal(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # so that files and runs are closed on the way out


def deepspeed_command(plan: Plan, job: Job, config: NeoXConfig) -> list[str]:
    """DeepSpeed's launcher, up to the script.

    On one machine that is its per-host part alone: the runner in front of it would import torch
    once more (two seconds) to start this very command, and report a kill of it as success.
    Over several hosts it is the runner, given the user's hostfile and filters as they are; it
    starts pdsh, mpirun or srun. That part has not been exercised on several machines yet.
    """
    common = ["--no_local_rank", "--log_level", "critical"]  # its errors, too, we say better
    common += ["--master_addr", job.master_addr, "--master_port", str(job.master_port)]
    if plan.hostfile is None:
        hosts = base64.urlsafe_b64encode(json.dumps(plan.hosts).encode()).decode()
        module = [sys.executable, "-m", "deepspeed.launcher.launch"]
        return [*module, f"--world_info={hosts}", *common]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *common]
    command += ["--hostfile", str(plan.hostfile), "--launcher", config.launcher]
    if config.include or config.exclude:
        command += ["--include", config.include] if config.include else []
        command += ["--exclude", config.exclude] if config.exclude else []
    else:
        command += ["--num_nodes", str(config.num_nodes)] if config.num_nodes > 0 else []
        command += ["--num_gpus", str(config.num_gpus)] if config.num_gpus else []
    command += ["--force_multi"] if config.force_multi else []
    command += ["--no_ssh_check"] if config.no_ssh_check else []
    if config.launcher == "slurm":
        options = {"account": config.account, "comment": config.comment}
        given = [f"--{name}={shlex.quote(value)}" for name, value in options.items() if value]
        command += ["--launcher_args", " ".join(given)] if given else []
    return command


def _launcher_environment(job: Job) -> dict[str, str]:
    environment = dict(os.environ)
    path = [str(_WORKER.parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)  # DeepSpeed passes it on to other hosts
    if job.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _choose_port(config: NeoXConfig) -> int:
    """The user's port, else any that is free now: two runs on a machine do not meet.

    It is taken seconds later, when the ranks are up. So it lies below 32768, where Linux begins to
    number outgoing connections, or one of those might have it by then.
    """
    if config.origin("master_port") != "default":
        return config.master_port
    while True:
        port = random.randrange(20000, 32768)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
