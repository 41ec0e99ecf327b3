"""manifest.json: what a finished checkpoint holds, with the size and checksum of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash

from neox.atomic import write_text
from neox.errors import DamageError

MANIFEST = "manifest.json"
FORWARD_PASS = "forward_pass.json"  # for checkpoint_validation_with_forward_pass
HAS_MANIFEST = "has_manifest"  # a key of the mp_rank files that were written with one
_FORMAT = 1
_CHUNK = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class Entry:
    """A file's size in bytes and its XXH3 checksum of 128 bits, as `xxhsum -H2` prints it.

    It is meant against damage, not against forgery, and is as fast as memory.
    """

    bytes: int
    xxh128: str


class Hasher:
    """An Entry of bytes that come in pieces."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self._bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        self._state.update(data)
        self._bytes += len(data)

    def entry(self) -> Entry:
        return Entry(self._bytes, self._state.hexdigest())


def digest(path: Path) -> Entry:
    """Read a whole file. Raises OSError."""
    hasher = Hasher()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(view[:count])
    return hasher.entry()


@dataclass(frozen=True)
class Manifest:
    """What stands in `folder`/manifest.json. File names are relative to `folder`, with slashes.

    `grid` holds tp, pp and dp; `architecture` the keys of neox.config.architecture.
    """

    folder: Path
    iteration: int
    grid: Mapping[str, int]
    padded_vocab_size: int
    architecture: Mapping[str, Any]
    files: Mapping[str, Entry] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None where there is no manifest. DamageError when it is not what was written."""
        path = folder / MANIFEST
        try:
            text = path.read_bytes().decode()  # read_text would take one line end for another
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise DamageError(f"{path} is damaged: it cannot be read ({error}).") from error
        try:
            body = json.loads(text)
            version = body["format"]
            manifest = cls(
                folder,
                body["iteration"],
                body["grid"],
                body["padded_vocab_size"],
                body["architecture"],
                {name: Entry(**entry) for name, entry in body["files"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamageError(f"{path} is damaged: it is not as it was written.") from error
        if version == _FORMAT and manifest._render() != text:  # also a changed blank is a change
            raise DamageError(f"{path} is damaged: it is not as it was written.")
        if version != _FORMAT:
            raise DamageError(
                f"{path} has format {version!r} and this program reads format {_FORMAT}: it is "
                "damaged, or of a newer program."
            )
        return manifest

    def write(self) -> None:
        write_text(self.folder / MANIFEST, self._render())

    def check_size(self, path: Path) -> None:
        """Raises DamageError when a file is missing, unlisted or of another size."""
        entry = self._entry(path)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DamageError(
                f"{path} is missing, and the checkpoint's {MANIFEST} lists it ({error.strerror})."
            ) from error
        if size != entry.bytes:
            raise DamageError(
                f"{path} is damaged: it has {size:,} bytes and was written with {entry.bytes:,}."
            )

    def check_sizes(self, pattern: str = "*") -> None:
        """`check_size` of every listed file whose name matches, such as "layer_*"."""
        for name in self.files:
            if fnmatchcase(name, pattern):
                self.check_size(self.folder / name)

    def check(self, path: Path) -> None:
        """`check_size`, and read the file through. Raises DamageError when a byte differs."""
        self.check_size(path)
        try:
            found = digest(path)
        except OSError as error:
            raise DamageError(f"{path} cannot be read: {error.strerror}.") from error
        if found != self._entry(path):
            raise DamageError(
                f"{path} is damaged: its checksum is {found.xxh128} and was "
                f"{self._entry(path).xxh128} when it was written."
            )

    def _entry(self, path: Path) -> Entry:
        name = path.relative_to(self.folder).as_posix()
        if name not in self.files:
            raise DamageError(
                f"{path} is not part of the checkpoint: its {MANIFEST} does not list it."
            )
        return self.files[name]

    def _render(self) -> str:
        """Canonical: equal manifests are equal texts. Its own checksum guards the values."""
        body = {
            "format": _FORMAT,
            "iteration": self.iteration,
            "grid": dict(self.grid),
            "padded_vocab_size": self.padded_vocab_size,
            "architecture": dict(self.architecture),
            "files": {name: asdict(entry) for name, entry in sorted(self.files.items())},
        }
        body["xxh128"] = xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps(body, indent=1, sort_keys=True) + "\n"
