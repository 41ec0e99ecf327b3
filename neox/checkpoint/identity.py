"""What tells one set of weights from another, without reading them where that can be avoided."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from neox import log
from neox.checkpoint.manifest import digest
from neox.checkpoint.neox import Checkpoint


def weights_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the names and checksums of the files that hold the weights.

    The checksums are the manifest's, or those in torch's zip archives; only files without any are
    read through. Other sizes of the grid store the same weights in other files: another digest.
    """
    found = {path for index in checkpoint.indices for path in checkpoint.source.files(index)}
    hasher = hashlib.sha256()
    with log.progress(total=len(found), desc="identifying the weights", unit="file") as bar:
        for path in sorted(found):
            for line in _checksums(checkpoint, path):
                hasher.update(f"{path.name} {line}\n".encode())
            bar.update()
    return hasher.hexdigest()


def _checksums(checkpoint: Checkpoint, path: Path) -> Iterator[str]:
    if checkpoint.manifest is not None:
        entry = checkpoint.manifest.files[path.relative_to(checkpoint.folder).as_posix()]
        yield f"{entry.bytes} {entry.xxh128}"
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                yield f"{record.filename} {record.file_size} {record.CRC:08x}"
    else:
        entry = digest(path)
        yield f"{entry.bytes} {entry.xxh128}"
