#!/usr/bin/env python3
"""Write a small corpus that every Python carries as JSON Lines: its own language reference.

    python tools/demo_corpus.py --output demo/corpus.jsonl

These are the texts behind `help("with")`: about 80 documents, half a million characters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox.atomic import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"topic": topic, "text": text}) for topic, text in sorted(topics.items())]
    write_text(options.output, "\n".join(lines) + "\n")
    characters = sum(map(len, topics.values()))
    print(f"{options.output}: {len(lines)} documents, {characters:,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
