#!/usr/bin/env python3
"""The one command: ./deepy.py train.py|generate.py|evaluate.py|serve.py CONF... (-h shows more)."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path


def find_libraries() -> None:
    """Continue under .venv's Python when this one lacks what `make install` puts there."""
    modern = sys.version_info >= (3, 11)
    if modern and all(importlib.util.find_spec(name) for name in ("torch", "yaml")):
        return
    environment = Path(__file__).resolve().parent / ".venv"
    python = environment / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != environment:
        os.execv(python, [str(python), *sys.argv])
    need = "Python 3.11 or later with torch and PyYAML"
    print(f"error: {sys.executable} is not {need}; run: make install", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    # Until there is anything to close, Ctrl-C ends it without a traceback through the imports.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    find_libraries()
    from neox.cluster.main import main

    sys.exit(main(sys.argv[1:]))
