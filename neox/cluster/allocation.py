"""The job that Slurm makes of a run outside of any: it lasts until its srun ends it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

_PATIENCE_S = 10.0


def cancel_job(folder: Path) -> None:
    """Cancel the job that has the name of a run's folder, if there is one.

    An srun that was killed leaves its job running, without a process, on hosts that nobody else
    gets then. A job around deepy.py has another name.
    """
    scancel = shutil.which("scancel")
    if scancel is None:
        return
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            [scancel, "--quiet", f"--name={folder.name}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE_S,
        )
