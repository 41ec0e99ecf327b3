"""Files inside files: compressed streams, tar and zip archives, read in one pass without unpacking.

Nothing is extracted: a member's name is only compared and shown.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import shutil
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from neox.errors import DataError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
ARCHIVES = (".tar", ".zip")
_ABBREVIATED = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tbz2": ".tar.bz2"}
# A zip archive has its table of contents at its end; inside a tar archive it is copied to be read.
_COPY_IN_MEMORY = 64 << 20
_BUFFER = 1 << 20


def contents_name(name: str) -> str:
    """The name of what is inside the compression, if there is any: a.tgz is a.tar compressed."""
    for ending, full in _ABBREVIATED.items():
        if name.endswith(ending):
            name = name.removesuffix(ending) + full
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name


def walk(name: str, stream: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, contents) of every file inside, decompressed, in the archive's order.

    A file that is no archive is the only one inside itself. Names are paths through the archives,
    like `a.tar/b.jsonl.zst`. Each stream must be read before the next one is asked for. Raises one
    of `damage()` where a file is damaged, here or while it is read.
    """
    with _decompressed(name, stream) as inside:
        kind = contents_name(name)
        if kind.endswith(".tar"):
            with tarfile.open(fileobj=inside, mode="r|") as archive:
                for member in archive:
                    if member.isfile() and not _is_hidden(member.name):
                        contents = archive.extractfile(member)
                        assert contents is not None
                        yield from walk(f"{name}/{member.name}", contents)
                    archive.members.clear()  # or it would remember millions of them
        elif kind.endswith(".zip"):
            yield from _walk_zip(name, inside)
        else:
            yield name, inside


def _walk_zip(name: str, stream: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    with tempfile.SpooledTemporaryFile(_COPY_IN_MEMORY) as copy:
        seekable: IO[bytes] = stream
        if not isinstance(getattr(stream, "raw", None), io.FileIO):  # it comes out of something
            shutil.copyfileobj(stream, copy)
            seekable = copy  # type: ignore[assignment]
        with zipfile.ZipFile(seekable) as archive:
            for member in archive.infolist():
                if not member.is_dir() and not _is_hidden(member.filename):
                    if member.flag_bits & 1:
                        raise DataError(f"{name}/{member.filename} is encrypted")
                    with archive.open(member) as contents:
                        yield from walk(f"{name}/{member.filename}", contents)


def _is_hidden(name: str) -> bool:
    """What file managers leave in archives: .DS_Store, ._name, __MACOSX/."""
    path = PurePosixPath(name)
    return path.name.startswith(".") or "__MACOSX" in path.parts


def _decompressed(name: str, stream: IO[bytes]) -> IO[bytes]:
    inside: Any
    if name.endswith((".gz", ".tgz")):
        inside = gzip.GzipFile(fileobj=stream)
    elif name.endswith(".zst"):
        inside = _zstd().ZstdFile(stream)
    elif name.endswith((".xz", ".txz")):
        inside = lzma.LZMAFile(stream)  # noqa: SIM115
    elif name.endswith((".bz2", ".tbz2")):
        inside = bz2.BZ2File(stream)
    else:
        return stream
    return io.BufferedReader(inside, _BUFFER)  # these read lines one call at a time


def damage() -> tuple[type[Exception], ...]:
    """The exceptions that tell of a damaged or cut-off file."""
    found: list[type[Exception]] = [EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError]
    found += [tarfile.TarError, zipfile.BadZipFile, NotImplementedError]
    with contextlib.suppress(DataError):  # then no .zst file is read
        found.append(_zstd().ZstdError)
    return tuple(found)


def _zstd() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise DataError(".zst files need a package: pip install backports.zstd") from None
    return zstd
