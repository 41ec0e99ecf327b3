#!/usr/bin/env python
"""Let `lm_eval --model neox` find this checkout's models, in the environment of this Python."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

REGISTRATION = Path(__file__).resolve().parents[1] / "neox/evaluation/registration.py"

# Python runs this line at its start. A checkout that has gone must not be an error there.
LINE = (
    f"import os; f = {str(REGISTRATION)!r}; os.path.exists(f) and "
    "exec(compile(open(f).read(), f, 'exec'), {'__name__': 'neox_registration', '__file__': f})"
)


def main() -> None:
    path = Path(sysconfig.get_path("purelib")) / "neox.pth"
    try:
        path.write_text(f"{LINE}\n")
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"lm_eval --model neox is {REGISTRATION.parents[2]}, by {path}")


if __name__ == "__main__":
    main()
