"""What the processes on other hosts get of this one's environment, and how: in a private file."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from neox.cluster.hosts import DRIVERS, read_lines
from neox.cluster.run_folder import RUN_FOLDER, START
from neox.errors import ConfigError

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
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # a shell ends at the export of any other
_OF_A_HOST = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", RUN_FOLDER)


def for_other_hosts(environment: Mapping[str, str]) -> dict[str, str]:
    """What of `environment` every process of a run gets, and what a file ~/.deepspeed_env adds.

    As with DeepSpeed, that file has lines NAME=VALUE, and DS_ENV_FILE names another. Raises
    ConfigError where that is not there.
    """
    chosen = {
        name: value
        for name, value in environment.items()
        if _WANTED.fullmatch(name) and name not in _OF_A_HOST and _NAME.fullmatch(name)
    }
    named = environment.get("DS_ENV_FILE")
    path = Path(named or Path.home() / ".deepspeed_env")
    if named and not path.is_file():
        raise ConfigError(f"DS_ENV_FILE is {named}, which is not a file; name another, or unset it")
    for line in read_lines(path) if path.is_file() else ():
        name, equals, value = (part.strip() for part in line.partition("="))
        if equals and _NAME.fullmatch(name):
            chosen[name] = value
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
    path = folder / START
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(os.fsencode("\n".join(lines) + "\n"))  # of any bytes, as an environment is
    return path
