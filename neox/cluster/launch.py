"""Decide which processes a run has and start them: one in place, several by a launcher."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from neox import log
from neox.cluster.allocation import cancel_job
from neox.cluster.environment import write_start
from neox.cluster.execute import execute, prepare_environment
from neox.cluster.hosts import (
    LOOPBACK,
    Slots,
    cores,
    cuda_devices,
    find_hostfile,
    own_names,
    read_hostfile,
    select,
    slurm_hosts,
)
from neox.cluster.place import FIRST_PORT, INHERITED, LAST_PORT, Place, Started
from neox.cluster.preflight import check_hosts
from neox.cluster.restarts import run
from neox.cluster.run_folder import Job, RunFolder, log_of, open_log
from neox.cluster.runners import (
    SSH_LAUNCHERS,
    WORKER,
    command_over_hosts,
    local_command,
)
from neox.cluster.supervise import GRACE_S, supervise
from neox.cluster.verdict import Outcome
from neox.config import Devices, NeoXConfig
from neox.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """The processes of a run: their hosts and slots, and what they compute on."""

    hosts: Slots
    device: str | None  # "cpu", "cuda", or None: each host decides for itself
    launcher: str | None = None  # what starts them over several hosts; None: they are all here

    @property
    def world_size(self) -> int:
        return sum(len(slots) for slots in self.hosts.values())


def find_devices(config: NeoXConfig) -> Devices:
    """What there is for a run of `config`, whose sizes need not be settled yet.

    Raises ConfigError for hosts or devices that are named and are not there.
    """
    there = _look_around(config)
    slots = tuple(len(slots) for slots in there.hosts.values())
    return Devices(slots if any(slots) else (), cores(), all_start=there.launcher is not None)


def make_plan(config: NeoXConfig) -> Plan:
    """Which processes to start: config.world_size of them, whichever of the devices come first.

    Raises ConfigError for hosts or devices that are named and are not there.
    """
    there = _look_around(config)
    if there.launcher is not None:
        return there
    (slots,) = there.hosts.values()
    slots = (slots or list(range(config.world_size)))[: config.world_size]
    return Plan({"localhost": slots}, there.device)


def _look_around(config: NeoXConfig) -> Plan:
    """Every slot that there is.

    Hosts come from the hostfile or, for launcher: slurm, from the job around us. Without either,
    this machine has as many slots as visible CUDA devices; without those, num_gpus on the CPU, or
    none that are numbered: [].
    """
    hostfile = find_hostfile(config)
    slots = None
    hosts = _named_hosts(hostfile, config)
    if hosts is None and (config.force_multi or config.num_nodes > 1):
        why = "force_multi is set" if config.force_multi else f"num_nodes is {config.num_nodes}"
        raise ConfigError(
            f"{why}, but no hostfile names the hosts; give one with -H, or set launcher: slurm "
            "in a job of Slurm's (salloc, sbatch)"
        )
    if hosts is not None:
        if len(hosts) > 1 and (loopback := LOOPBACK & set(hosts)):
            raise ConfigError(
                f"{hostfile}: other hosts do not know this one as {loopback.pop()}; write its "
                f"name, {socket.gethostname()}, or its address"
            )
        if config.force_multi or len(hosts) > 1 or not own_names().issuperset(hosts):
            return Plan(hosts, None, config.launcher)
        (slots,) = hosts.values()
    devices = cuda_devices()
    if not devices:
        return Plan({"localhost": slots or list(range(config.num_gpus or 0))}, "cpu")
    if slots is None:
        (slots,) = select({"localhost": devices}, config).values()
    if not set(slots) <= set(devices):
        where = hostfile or "Slurm's job"
        raise ConfigError(f"{where}: slots {slots}, but the CUDA devices here are {devices}")
    return Plan({"localhost": slots}, "cuda")


def _named_hosts(hostfile: Path | None, config: NeoXConfig) -> Slots | None:
    """The hosts and slots of the hostfile or of Slurm's job that the configuration selects."""
    if hostfile is not None:
        return select(read_hostfile(hostfile), config, f"write slots=N there, in {hostfile}")
    hosts = slurm_hosts(os.environ) if config.launcher == "slurm" else None
    if hosts is None:
        return None
    return select(hosts, config, "ask Slurm for them with --ntasks-per-node or --gpus-per-node")


def launch(entry_point: str | None, script: Path | None, config: NeoXConfig, plan: Plan) -> int:
    """Run an entry point, or the user's script, on every process of the plan.

    Returns the exit status. A NeoXError of a process that ran in place is raised here; one of
    several processes has been printed.
    """
    several_hosts = plan.launcher is not None
    if plan.world_size > 1 and plan.device == "cpu" and config.distributed_backend == "nccl":
        log.info(f"no CUDA device: {plan.world_size} processes on the CPU, gloo instead of nccl")
    # What else there is has nothing to go on from.
    restarts = config.restarts if entry_point in ("train", None) else 0
    if plan.world_size == 1 and not several_hosts and not restarts:
        if plan.device == "cuda":  # as DeepSpeed's launcher does for each of several
            os.environ["CUDA_VISIBLE_DEVICES"] = str(plan.hosts["localhost"][0])
        return _run_in_place(_job(entry_point, script, config, plan), config, Place())

    def attempt(config: NeoXConfig, extra: Mapping[str, str]) -> Outcome:
        job = _job(entry_point, script, config, plan)
        environment = {**_launcher_environment(job), **extra}
        # The other hosts see the current folder, not this machine's /tmp.
        folder = RunFolder.create(job, config, parent=Path.cwd() if several_hosts else None)
        try:
            if several_hosts:
                command = command_over_hosts(plan.hosts, job, config, folder.path)
                write_start(folder.path, environment)
                if config.launcher in SSH_LAUNCHERS and not config.no_ssh_check:
                    check_hosts(plan.hosts, folder.path)
            else:
                command = [*local_command(plan.hosts, job), str(WORKER), str(folder.path)]
            return supervise(
                command,
                environment,
                folder,
                plan.world_size,
                hosts=plan.hosts if several_hosts else (),
                grace_s=_grace(entry_point, config),
                watchdog_s=config.watchdog_timeout if entry_point == "train" else 0.0,
            )
        finally:
            if several_hosts and config.launcher == "slurm":
                cancel_job(folder.path)
            folder.remove()

    return run(config, attempt, restarts)


def _job(entry_point: str | None, script: Path | None, config: NeoXConfig, plan: Plan) -> Job:
    several_hosts = plan.launcher is not None
    return Job(
        entry_point=entry_point,
        script=None if script is None else str(script),
        device=plan.device,
        world_size=plan.world_size,
        master_addr=config.master_addr
        or (next(iter(plan.hosts)) if several_hosts else "127.0.0.1"),
        master_port=_choose_port(config),
        host=socket.gethostname(),
        log_dir=config.log_dir,
        hosts=plan.hosts,
    )


def _grace(entry_point: str | None, config: NeoXConfig) -> float:
    """A server's running requests have theirs, and then it takes a forward pass to end."""
    return GRACE_S + (config.serve_grace + 10.0 if entry_point == "serve" else 0.0)


def run_started(
    entry_point: str | None, script: Path | None, config: NeoXConfig, started: Started
) -> int:
    """Run this process's share of a run whose processes the user has started.

    Called by each of them. Returns the exit status; raises what went wrong in this process.
    """
    address, port = started.meeting_point(config)
    job = Job(
        entry_point=entry_point,
        script=None if script is None else str(script),
        device=None,
        world_size=started.world_size,
        master_addr=address,
        master_port=port,
        host=socket.gethostname(),
    )
    rank = started.place.rank
    if rank > 0:  # the console is rank 0's; errors are everybody's
        log_dir = config.log_dir
        kept = open_log(log_of(log_dir, rank, job.host)) if log_dir else None
        os.dup2(os.open(os.devnull, os.O_WRONLY) if kept is None else kept, 1)
    return _run_in_place(job, config, started.place)


def _run_in_place(job: Job, config: NeoXConfig, place: Place) -> int:
    # Set even where the shell started us with SIGINT ignored, as it does for background jobs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _exit_by_signal)
    prepare_environment(job, place)
    if job.script is None:
        execute(job, config, None, place)
        return 0
    with tempfile.NamedTemporaryFile("w", prefix="neox-config-", suffix=".json") as file:
        file.write(config.encode())
        file.flush()
        execute(job, config, Path(file.name), place)
    return 0


def _exit_by_signal(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # so that files and runs are closed on the way out


def _launcher_environment(job: Job) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in INHERITED}
    path = [str(WORKER.parents[2]), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    if job.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _choose_port(config: NeoXConfig) -> int:
    """The user's port, else any that is free here now: two runs on a machine do not meet.

    It is taken seconds later, when the ranks are up, by rank 0, which may be on another host. So it
    lies below 32768, where Linux begins to number outgoing connections, or one of those might have
    it by then.
    """
    if config.origin("master_port") != "default":
        return config.master_port
    while True:
        port = random.randrange(FIRST_PORT, LAST_PORT + 1)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
