"""A person at a terminal: a process on a pseudo-terminal of its own, keys in, screen out."""

from __future__ import annotations

import fcntl
import os
import re
import select
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PATIENCE_S = 120.0  # for a process to answer on a busy machine; nothing is measured with it
CTRL_C, CTRL_D, CTRL_Z, UP = "\x03", "\x04", "\x1a", "\x1b[A"


class Person:
    """Runs `command` in the foreground of a new terminal and looks at its screen."""

    def __init__(
        self, command: Sequence[str | Path], cwd: Path, environment: Mapping[str, str]
    ) -> None:
        self._keys, terminal = os.openpty()
        self._terminal = os.dup(terminal)

        def take() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self._process = subprocess.Popen(
            command,
            cwd=cwd,
            env={"TERM": "xterm", **os.environ, **environment},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=take,
        )
        os.close(terminal)
        self.screen = ""
        self._output = b""
        self._seen = 0

    def types(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def interrupts_typing(self) -> None:
        """Press Ctrl-C once the process waits for a key.

        Python loses one that comes in the microseconds between a key and the next: no person is so
        fast, but a test is.
        """
        while True:
            state = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2][0]
            if state == "S":
                return self.types(CTRL_C)

    def sees(self, pattern: str) -> str:
        """Wait for what matches `pattern` behind what was seen before; return what came till then.

        Codes that color and move are left out.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            match = re.compile(pattern).search(self.screen, self._seen)
            if match:
                before, self._seen = self._seen, match.end()
                return self.screen[before : match.end()]
            assert time.monotonic() < deadline and self._read(), (
                f"no {pattern!r} in {self.screen[self._seen :]!r}, after {self.screen!r}"
            )

    def leaves(self) -> int:
        """Wait for the end; return the status. The terminal must be as it was: with an echo."""
        while self._read():
            pass
        status = self._process.wait(PATIENCE_S)
        assert termios.tcgetattr(self._terminal)[3] & termios.ECHO
        return status

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._keys)
        os.close(self._terminal)

    def _read(self) -> bool:
        """Add to the screen; False once the process has ended and nothing more comes."""
        ended = self._process.poll() is not None
        if select.select([self._keys], [], [], 0.0 if ended else 0.05)[0]:
            self._output += os.read(self._keys, 65536)
            # What was cut off in the middle of a character or a code is not shown yet.
            text = self._output.decode(errors="ignore").rpartition("\x1b[")
            complete = "".join(text) if re.match(r"[?0-9;]*[A-Za-z]", text[2]) else text[0]
            self.screen = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "", complete or text[2])
            return True
        return not ended
