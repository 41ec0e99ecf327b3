#!/usr/bin/env python
"""Let `lm_eval --model neox` find this checkout's models, in the environment of this Python."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

# Python runs this line at its start. A checkout that has gone must not be an error there.
LINE = (
    "import importlib.util as u; u.find_spec('neox') and "
    "__import__('neox.evaluation.registration').evaluation.registration.register_when_imported()"
)


def main() -> None:
    path = Path(sysconfig.get_path("purelib")) / "neox.pth"
    try:
        path.write_text(f"{CHECKOUT}\n{LINE}\n")
    except OSError as error:
        print(f"error: {path} cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"lm_eval --model neox is {CHECKOUT}, by {path}")


if __name__ == "__main__":
    main()
