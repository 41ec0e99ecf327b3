"""The first process of a host, or of the switch: `host_init.py [FOLDER]`.

It lives as long as its standard input is open, which the test's process holds. Its end is the end
of its namespaces and, as it is process 1 there, of every process in them. The switch's, which ends
with the hosts, removes FOLDER.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGCHLD, lambda number, frame: reap())  # orphans come to process 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.write(1, b"up\n")
    os.read(0, 1)
    for folder in sys.argv[1:]:
        shutil.rmtree(folder, ignore_errors=True)


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    main()
