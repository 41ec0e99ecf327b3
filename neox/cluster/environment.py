"""What the processes on other hosts get of this one's environment, and how: in a private file."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from neox.cluster.hosts import DRIVERS
from neox.cluster.run_folder import RUN_FOLDER

# Settings of libraries, by how they begin, and what programs are found by. The rest of an
# environment is about a session or a host.
_WANTED = re.compile(
    r"""
    (AWS|COMET|DEEPSPEED|DS|FI|GLOO|HF|HIP|HSA|IBV|KMP|LC|MALLOC|MKL|NCCL|NEOX|NVIDIA|NVTE|OMP)_.*
    | (CUDA|PYTORCH|RCCL|ROCM|TIKTOKEN|TOKENIZERS|TRANSFORMERS|TRITON|UCX|WANDB|XLA)_.*
    | (HUGGING|PYTHON|TENSORBOARD|TORCH).*
    | CONDA_PREFIX | DATA_DIR | LANG | LD_LIBRARY_PATH | LD_PRELOAD | LOGLEVEL | PATH | TZ
    | REQUESTS_CA_BUNDLE | SSL_CERT_FILE | VIRTUAL_ENV
    | (?i: (http|https|no)_proxy )
    """,
    re.VERBOSE,
)
_OF_A_HOST = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", RUN_FOLDER)


def for_other_hosts(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` every process of a run gets, and what a file ~/.deepspeed_env adds.

    As with DeepSpeed, that file has lines NAME=VALUE, and DS_ENV_FILE names another.
    """
    chosen = {
        name: value
        for name, value in environment.items()
        if _WANTED.fullmatch(name) and name not in _OF_A_HOST
    }
    path = Path(environment.get("DS_ENV_FILE") or Path.home() / ".deepspeed_env")
    if path.is_file():
        for line in path.read_text().splitlines():
            name, equals, value = line.strip().partition("=")
            if equals and name.strip().isidentifier():
                chosen[name.strip()] = value.strip()
    return chosen


def write_start(folder: Path, environment: Mapping[str, str]) -> Path:
    """Write the script with which every process over several hosts begins; return its path.

    It goes to this process's working folder, sets the variables and becomes the command that
    follows. Its mode is 600, for some are keys, and command lines can be read by all users.
    """
    variables = {**for_other_hosts(environment), RUN_FOLDER: str(folder)}
    no_driver = " && ".join(f"[ ! -e {driver} ]" for driver in DRIVERS)
    lines = [
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())),
        f"if {no_driver}; then export DS_ACCELERATOR=cpu; fi",  # or it warns that it is
        'exec "$@"',
    ]
    path = folder / "start"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write("\n".join(lines) + "\n")
    return path
