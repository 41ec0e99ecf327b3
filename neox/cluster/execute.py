"""Run one rank's share of a job: the same code in place and under a launcher."""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
from pathlib import Path

from neox import log
from neox.cluster.hosts import cores, cuda_driver
from neox.cluster.network import interface_towards
from neox.cluster.peers import check_peers
from neox.cluster.place import Place
from neox.cluster.run_folder import CONFIG_FILE, Job
from neox.config import NeoXConfig


def prepare_environment(job: Job, place: Place) -> None:
    """Set what the libraries read while they are imported; call before torch is."""
    slots = job.slots(place.rank)
    if job.device is None and slots != list(range(len(slots))):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.local_rank),
        WORLD_SIZE=str(job.world_size),
        MASTER_ADDR=job.master_addr,
        MASTER_PORT=str(job.master_port),
    )
    if place.local_size > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // place.local_size)))
    if job.device == "cpu" or (job.device is None and not cuda_driver()):
        # A launcher numbers its processes in CUDA_VISIBLE_DEVICES, also on a CPU.
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    if job.world_size == place.local_size:
        # All ranks are here: gloo must not go through a network that may be filtered or down.
        loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    elif (interface := interface_towards([job.master_addr, *job.hosts])) is not None:
        # gloo takes the address of this host's name, which Debian's /etc/hosts makes 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HOME", os.path.expanduser("~"))  # cron has none; W&B's service wants it
    log.set_rank(place.rank)
    log.quiet_third_parties()


def execute(job: Job, config: NeoXConfig, config_file: Path | None, place: Place) -> None:
    """Call the entry point's `main(config, groups)`, or run the user's script as __main__.

    A script reads its configuration by
    `NeoXConfig.decode(Path(os.environ["NEOX_CONFIG_FILE"]).read_text())`. It finds RANK,
    LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment; torch.distributed is its
    own affair.
    Collective over the world for our entry points. `prepare_environment` has been called.
    """
    if job.script is not None:
        os.environ[CONFIG_FILE] = str(config_file)
        sys.argv = [job.script]
        sys.path.insert(0, str(Path(job.script).parent))
        runpy.run_path(job.script, run_name="__main__")
        return

    import torch

    from neox.parallel.groups import connect, initialize, shutdown
    from neox.parallel.topology import Topology

    # Entry points stand above this package; like a user's script, they are named by the job.
    entry_point = importlib.import_module(f"neox.entrypoints.{job.entry_point}")
    if job.device == "cuda" or (job.device is None and torch.cuda.is_available()):
        # srun --gpus-per-task shows each process its own one alone.
        index = place.local_rank if torch.cuda.device_count() > 1 else 0
        device, backend = torch.device("cuda", index), config.distributed_backend
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    replicas = job.world_size // (config.tp * config.pp)
    if job.world_size > place.local_size:
        connect(backend)
        check_peers(config)
    groups = initialize(Topology(config.pp, replicas, config.tp), backend, device)
    entry_point.main(config, groups)
    shutdown(groups)
