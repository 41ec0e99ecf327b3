"""Logits for given token ids: arrays in, an array out, for whatever compares models."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from neox import log
from neox.atomic import replacing
from neox.errors import DataError
from neox.inference.stages import InferenceModel

_NAMES = ("tokens", "input_ids")
_CHUNK = 1 << 26  # logits computed at a time: 256 MiB, and a row at least


def read_tokens(path: Path) -> Tensor:
    """The token ids [B, S], int64, of an .npz file: `tokens`, `input_ids`, or its only array.

    Raises DataError.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            name = _choose(path, archive.files)
            array = archive[name]
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: name an .npz file of token ids.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        # A file that holds a bare array is loaded as one, which has neither `files` nor an exit.
        raise DataError(f"{path} is not an .npz file of plain arrays of numbers.") from error
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path}: {name} is {array.dtype} {list(array.shape)}, but token ids are integers "
            "[batch, length], at least one of each."
        )
    return torch.from_numpy(array.astype(np.int64))


def _choose(path: Path, names: list[str]) -> str:
    for name in _NAMES:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise DataError(
        f"{path} holds {', '.join(names) or 'no arrays'}: name the one with the token ids "
        f"{' or '.join(_NAMES)}."
    )


def check_output(path: Path) -> None:
    """Refuse a place that cannot be written, before anything is computed. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DataError(f"logits cannot be written to {path}: {error.strerror}.") from error


def write_logits(model: InferenceModel, tokens_BS: Tensor, path: Path) -> None:
    """Write an .npz file with `logits`, float32 [B, S, V] over the padded vocabulary, in chunks.

    The last stage's first rank writes; the file appears when it is whole. Collective over the
    replica, every rank passing the same tokens. Raises DataError.
    """
    _check_tokens(model, tokens_BS)
    batch, length = tokens_BS.shape
    vocabulary = model.padded_vocab_size
    rows = max(1, _CHUNK // (length * vocabulary))
    with log.progress(total=batch, desc="logits", unit="row") as bar:
        if not model.is_source:
            for chunk in tokens_BS.split(rows):
                model(chunk)
                bar.update(len(chunk))
            return
        try:
            with _writing(path, "logits", (batch, length, vocabulary)) as file:
                for chunk in tokens_BS.split(rows):
                    logits = model(chunk)
                    assert logits is not None
                    file.write(memoryview(logits.cpu().contiguous().numpy()).cast("B"))
                    bar.update(len(chunk))
        except OSError as error:
            raise DataError(f"logits cannot be written to {path}: {error.strerror}.") from error


def _check_tokens(model: InferenceModel, tokens_BS: Tensor) -> None:
    low, high = (int(bound) for bound in tokens_BS.aminmax())
    if low < 0 or high >= model.padded_vocab_size:
        raise DataError(
            f"the token ids run from {low} to {high}, but the model's vocabulary has the ids 0 to "
            f"{model.padded_vocab_size - 1}."
        )
    positions, length = model.config.max_position_embeddings, tokens_BS.shape[1]
    if model.config.pos_emb == "learned" and length > positions:
        raise DataError(
            f"the rows are {length} tokens long, but the model has learned {positions} positions."
        )


@contextmanager
def _writing(path: Path, name: str, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """An .npz file of one float32 array, whose bytes are written in the block."""
    with (
        replacing(path) as file,
        zipfile.ZipFile(file, "w") as archive,
        archive.open(f"{name}.npy", "w", force_zip64=True) as entry,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(entry, header)
        yield entry
