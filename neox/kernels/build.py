"""The kernels' library: compiled at its first use, for this machine's instruction set, and kept.

Where there is no compiler, or it fails, there are no kernels, and torch does their work.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from neox import log
from neox.atomic import write_bytes

SOURCES = Path(__file__).parent
_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"]
_FLAGS += ["-ffp-contract=off", "-fno-math-errno"]  # vector.h tells why
# By the instruction set's name, best first: what the compiler and /proc/cpuinfo call it.
_X86 = {
    "avx512": (
        [f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl", "vnni")] + ["-mfma", "-mbmi2"],
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "bmi2", "fma"},
    ),
    "avx2": (["-mavx2", "-mfma", "-mbmi2", "-mf16c"], {"avx2", "bmi2", "fma", "f16c"}),
    "plain": ([], set[str]()),
}


def instruction_sets() -> list[str]:
    """Those that the kernels can be built for and this machine has, fastest first."""
    if platform.machine() != "x86_64":
        return ["plain"]
    have = _cpu_flags()
    return [name for name, (_, needs) in _X86.items() if needs <= have]


def open_library(wanted: list[str]) -> ctypes.CDLL | None:
    """The kernels for the first of these instruction sets that can be had; a line tells of none.

    They are kept in $XDG_CACHE_HOME/neox, by default ~/.cache/neox, if that is this user's alone.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or ""]
    problem = "there is no g++ (or $CXX)"
    if compiler != [""] and sys.platform.startswith("linux"):
        for name in wanted:
            try:
                return _open(name, compiler)
            except subprocess.CalledProcessError as error:
                lines = error.stderr.strip().splitlines() or ["no message"]
                problem = next((line for line in lines if "error" in line), lines[0])
            except (OSError, subprocess.TimeoutExpired) as error:
                problem = str(error)
    log.info(f"no kernels for this CPU, torch works more slowly: {problem}")
    return None


def _open(instruction_set: str, compiler: list[str]) -> ctypes.CDLL:
    """The library as it was kept, or compiled. CalledProcessError, TimeoutExpired, OSError."""
    flags = [*_FLAGS, *(_X86[instruction_set][0] if platform.machine() == "x86_64" else [])]
    command = [*compiler, *flags]
    sources = {path.name: path.read_bytes() for path in SOURCES.iterdir() if _is_source(path)}
    place = _cache()
    kept = None if place is None else place / f"{instruction_set}-{_digest(command, sources)}.so"
    if kept is not None and _is_whole(kept):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        for name, source in sources.items():
            (Path(folder) / name).write_bytes(source)
        made = Path(folder) / "library.so"
        command += [str(Path(folder) / "library.cpp"), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        if kept is not None:
            code = made.read_bytes()
            with contextlib.suppress(OSError):
                write_bytes(kept, code + hashlib.sha256(code).digest())
        return ctypes.CDLL(str(made))  # which stays when its file is gone


def _is_source(path: Path) -> bool:
    return path.suffix in (".h", ".cpp")


def _digest(command: list[str], sources: dict[str, bytes]) -> str:
    """Of everything that a library is made from, and for."""
    digest = hashlib.sha256(" ".join([platform.machine(), *command]).encode())
    for name in sorted(sources):
        digest.update(sources[name])
    return digest.hexdigest()[:16]


def _cache() -> Path | None:
    """The folder of libraries, if nobody else can write there: what is in it will be run."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_ours(folder) else None
    except (OSError, RuntimeError):  # no home
        return None


def _is_ours(path: Path) -> bool:
    status = path.stat()
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (os.getuid(), 0) and not others


def _is_whole(path: Path) -> bool:
    """Whether a library is there, with its checksum behind it: a part of one would crash us."""
    try:
        code = path.read_bytes()
        return _is_ours(path) and hashlib.sha256(code[:-32]).digest() == code[-32:]
    except OSError:
        return False


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())
