#!/usr/bin/env python
"""Write docs/configuration.md from the declarations of the keys: `python tools/config_docs.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from neox.atomic import write_text  # noqa: E402
from neox.config.config import SECTIONS  # noqa: E402
from neox.config.fields import Key, keys_of  # noqa: E402
from neox.config.optimizer_params import OPTIMIZER_PARAMS  # noqa: E402
from neox.config.values import describe_type, listed, plain  # noqa: E402

PAGE = REPOSITORY / "docs" / "configuration.md"
STATUS = {
    "acts": "",
    "ignored": "**Does nothing**: ",
    "refused": "**Refused** at any other value: ",
    "derived": "**Not read**: ",
}
INTRODUCTION = """\
# Configuration

<!-- Written by tools/config_docs.py from the declarations in neox/config; don't edit it here. -->

A run is described by YAML or JSON files, merged: `./deepy.py train.py -d configs 125M.yml
local_setup.yml`. Keys are GPT-NeoX's, and a configuration written for it can be used as it is.

- A key stands in one file only; hyphens and underscores are the same. `.yml`, `.yaml` and `.json`
  may be left off a file's name.
- `6e-4` is a number, `null` is the default, text that looks like a number needs quotes.
- The command line wins over the files: `--set train_iters=100`, `--set optimizer.params.lr=6e-4`.
  `--dry_run` prints every value and where it comes from.
- Whatever is wrong is reported at once, with file and line. A key that does nothing gets a warning
  when it is set to something else than its default.

"""


def page() -> str:
    """The whole text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for section in SECTIONS:
        title = section.__name__.removesuffix("Config")
        parts.append(f"## {title}\n\n{_summary(section)}\n\n{_table(section)}\n")
        for path, block in _blocks(section, ""):
            parts.append(f"### {path}\n\n{_table(block)}\n")
    return "\n".join(parts)


def _summary(owner: type) -> str:
    return (owner.__doc__ or "").partition("\n\n")[0].replace("\n    ", " ")


def _blocks(owner: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, spec in keys_of(owner).items():
        if spec.block is None:
            continue
        yield prefix + name, spec.block
        yield from _blocks(spec.block, f"{prefix}{name}.")
        if prefix + name == "optimizer":
            for params in dict.fromkeys(OPTIMIZER_PARAMS.values()):
                kinds = [kind for kind, its in OPTIMIZER_PARAMS.items() if its is params]
                yield f"optimizer.params of {listed(kinds, 'and')}", params


def _table(owner: type) -> str:
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    rows += [_row(name, spec) for name, spec in keys_of(owner).items()]
    return "\n".join(rows)


def _row(name: str, spec: Key) -> str:
    default = "required" if spec.required else _code(json.dumps(spec.default))
    cells = (f"`{name}`", describe_type(spec.type), default, _meaning(spec))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code(text: str) -> str:
    return "" if text == "null" else f"`{text}`"


def _meaning(spec: Key) -> str:
    text = spec.doc + _bounds(spec)
    if spec.status != "acts":
        text += f" {STATUS[spec.status]}{spec.reason}."
    reasons: dict[str, list[str]] = {}
    for value, why in spec.refused.items():
        reasons.setdefault(why, []).append(f"`{value}`")
    for why, values in reasons.items():
        text += f" Refused: {listed(values, 'and')}, {why}."
    return text


def _bounds(spec: Key) -> str:
    low = f"{plain(spec.low)} or more" if spec.low is not None else ""
    low = f"more than {plain(spec.above)}" if spec.above is not None else low
    high = f"at most {plain(spec.high)}" if spec.high is not None else ""
    return f" ({', '.join(filter(None, [low, high]))})" if low or high else ""


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
