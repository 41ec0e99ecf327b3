"""Compiling the kernels on this machine, for its instruction set, once.

Where there is no compiler, or it fails, there are no kernels, and torch does their work.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
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
        ["-march=x86-64-v4", "-mavx512vnni"],
        {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "bmi2", "fma"},
    ),
    "avx2": (["-march=x86-64-v3"], {"avx2", "bmi2", "fma", "f16c"}),
    "plain": ([], set[str]()),
}


def instruction_sets() -> list[str]:
    """Those that the kernels can be built for and this machine has, fastest first."""
    if platform.machine() != "x86_64":
        return ["plain"]  # of which compilers make NEON on ARM
    have = _cpu_flags()
    return [name for name, (_, needs) in _X86.items() if needs <= have]


def build(instruction_set: str) -> Path | None:
    """The shared library for it, from the cache or compiled now; None where that is impossible.

    The cache is $XDG_CACHE_HOME/neox, by default ~/.cache/neox.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    flags = [*_FLAGS, *(_X86[instruction_set][0] if platform.machine() == "x86_64" else [])]
    path = _cache() / f"kernels-{instruction_set}-{_digest(compiler, flags)}.so"
    if path.exists():
        return path
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / path.name
            command = [compiler, *flags, str(SOURCES / "library.cpp"), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            write_bytes(path, made.read_bytes())
    except subprocess.CalledProcessError as error:
        first = next(iter(error.stderr.strip().splitlines()), "no message")
        log.info(f"no kernels: {compiler} cannot build them ({first}); torch's are used")
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        log.info(f"no kernels: they cannot be built ({error}); torch's are used")
        return None
    return path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox"


def _digest(compiler: str, flags: list[str]) -> str:
    """Of everything that the library is made from."""
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for source in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())
