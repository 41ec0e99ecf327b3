"""What a model answered, kept from one run to the next.

A folder for each model; in it a file of each process that computed something: a JSON object a
line, flushed as soon as it is known, so that a run that is killed loses only what it was
computing. No file is ever changed by another process, and a damaged line is no answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from neox import log
from neox.config import NeoXConfig

# Answers of another version are not used. Count up when the same question gets another answer.
VERSION = 1


def cache_folder(config: NeoXConfig) -> Path | None:
    """Where answers of all models are kept; None if they are not."""
    if not config.eval_use_cache:
        return None
    if config.eval_cache_dir is not None:
        return Path(config.eval_cache_dir)
    if "NEOX_CACHE" in os.environ:
        return Path(os.environ["NEOX_CACHE"]) / "answers"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neox" / "answers"


def digest(value: Any) -> str:
    """SHA-256 of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Answers:
    """The answers of one model, under the digests of what it was asked.

    `folder` is the model's own; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: TextIO | None = None

    def read(self) -> dict[str, Any]:
        """Everything that is known."""
        answers: dict[str, Any] = {}
        for path in sorted(self._folder.glob("*.jsonl")) if self._folder else ():
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    answers.update(_parse(line))
        return answers

    def keep(self, answers: Mapping[str, Any]) -> None:
        """Write them down. A folder that cannot be written ends the keeping, not the run."""
        if self._folder is None or not answers:
            return
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
                self._file = (self._folder / name).open("w", encoding="utf-8")
            self._file.writelines(_lines(answers.items()))
            self._file.flush()
        except OSError as error:
            log.warning(f"answers are not kept in {self._folder} any more: {error.strerror}")
            self._folder = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines(answers: Iterable[tuple[str, Any]]) -> Iterable[str]:
    for key, answer in answers:
        body = json.dumps([key, answer], ensure_ascii=True)
        yield f"{zlib.crc32(body.encode()):08x} {body}\n"


def _parse(line: str) -> dict[str, Any]:
    """{key: answer}; {} for what was not written whole, or is not as it was written."""
    checksum, _, body = line.rstrip("\n").partition(" ")
    if checksum != f"{zlib.crc32(body.encode()):08x}":
        return {}
    key, answer = json.loads(body)
    return {key: answer}
