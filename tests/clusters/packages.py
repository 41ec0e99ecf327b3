"""What the tests of clusters need of Debian."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# program -> its package
PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "munged": "munge",
    "mpirun.openmpi": "openmpi-bin",
    "mpirun.mpich": "mpich",
    "pdsh": "pdsh",
    "sshd": "openssh-server",
    "ip": "iproute2",
}
_POLICY = Path("/usr/sbin/policy-rc.d")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class NoCluster(Exception):
    """Why this machine cannot play a cluster, in one line."""


def install_packages() -> None:
    """Install what is missing, without starting any of its services. Raises NoCluster."""
    if os.geteuid() != 0:
        raise NoCluster("hosts are namespaces, which only root can make: run it as root")
    missing = [name for program, name in PROGRAMS.items() if not shutil.which(program, path=PATH)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise NoCluster(f"there is no apt-get here to install {', '.join(missing)}")
    guard = not _POLICY.exists()  # it tells Debian's scripts whether they may start a service
    if guard:
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        install = ["install", "-y", "-qq", "--no-install-recommends", *missing]
        for words in (["update", "-qq"], install):
            done = subprocess.run(
                ["apt-get", *words],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise NoCluster(f"apt-get could not install {', '.join(missing)}: {last}")
    finally:
        if guard:
            _POLICY.unlink()
