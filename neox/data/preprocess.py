"""Raw text to tokenized datasets: reading, tokenizing in processes, writing in order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from neox import log
from neox.data.corpus import Chunk, find_files, read_chunks
from neox.data.indexed import IndexedWriter, idx_path
from neox.data.recipes import Recipe
from neox.errors import DataError

# Chunks per process that are read, being tokenized or waiting to be written: so none is ever idle.
_IN_FLIGHT = 4
_worker_encoder: _Encoder  # in each process of the pool


@dataclass(frozen=True)
class Summary:
    documents: int
    tokens: int  # without labels
    masked: int  # labels that are not learnt
    seconds: float


@dataclass(frozen=True)
class _Encoded:
    """One chunk's documents, end to end, for each dataset."""

    ids: list[np.ndarray]
    lengths: list[np.ndarray]
    bytes_read: int  # as the chunk's


class _Encoder:
    """Turns chunks into token ids; one lives in each process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(self, chunk: Chunk) -> _Encoded:
        rows = list(self.recipe.rows(list(chunk.records())))
        ids, lengths = [], []
        for k in range(len(self.recipe.names)):
            documents = [row[k] for row in rows]
            counts = np.array([len(tokens) for tokens in documents], dtype=np.int32)
            flat = chain.from_iterable(documents)
            total = int(counts.sum(dtype=np.int64))
            ids.append(np.fromiter(flat, dtype=self.recipe.dtype, count=total))
            lengths.append(counts)
        return _Encoded(ids, lengths, chunk.bytes_read)


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    num_docs: int | None = None,
    log_interval: int = 100,
) -> Summary:
    """Tokenize `inputs` into {output_prefix}_{name}_document.bin and .idx for each name.

    The files do not depend on `workers`, and appear only when all is done; whatever ends us before
    leaves the old ones, or at least no two that do not belong together. Memory does not grow with
    the input, but for 4 bytes per document and name. Texts without tokens make no document. The
    progress bar moves every `log_interval` documents and ends at `num_docs`, or where the share of
    bytes read so far lets expect. DataError for input that cannot be used, naming file and line,
    and for input without any text.
    """
    started = time.monotonic()
    if workers < 1:
        raise DataError(f"--workers {workers}: one process at least is needed")
    files = find_files(inputs)
    prefixes = [f"{output_prefix}_{name}_document" for name in recipe.names]
    if len(set(prefixes)) < len(prefixes):
        raise DataError(
            f"--jsonl-keys: two datasets would take the same name ({', '.join(recipe.names)}); "
            "labels are named after their key"
        )
    try:
        counts = _write(files, prefixes, recipe, workers, num_docs, log_interval)
    except OSError as error:
        raise DataError(f"cannot write {output_prefix}: {error.strerror or error}") from None
    return Summary(*counts, time.monotonic() - started)


def _write(
    files: Sequence[Path],
    prefixes: Sequence[str],
    recipe: Recipe,
    workers: int,
    num_docs: int | None,
    log_interval: int,
) -> tuple[int, int, int]:
    """(documents, tokens, labels that are masked)."""
    input_bytes = sum(file.stat().st_size for file in files)
    documents = tokens = masked = 0
    texts = len(prefixes) - recipe.labels
    with ExitStack() as stack:
        bar = stack.enter_context(
            log.progress(total=num_docs or 0, desc="tokenizing", unit=" docs")
        )
        writers = [
            stack.enter_context(IndexedWriter(prefix, dtype=recipe.dtype)) for prefix in prefixes
        ]
        results = stack.enter_context(
            closing(_encode_all(_Encoder(recipe), read_chunks(files), workers))
        )
        for encoded in results:
            for writer, ids, lengths in zip(writers, encoded.ids, encoded.lengths, strict=True):
                writer.add(ids, lengths)
            tokens += sum(map(len, encoded.ids[:texts]))
            masked += sum(int(np.count_nonzero(ids < 0)) for ids in encoded.ids[texts:])
            documents += len(encoded.lengths[0])
            if documents - bar.n >= log_interval:
                bar.total = num_docs or documents * input_bytes // max(encoded.bytes_read, 1)
                bar.update(documents - bar.n)
        if not documents:
            raise DataError(f"there is no text in {', '.join(map(str, files))}")
        for prefix in prefixes:  # an old dataset must not stand beside new labels of another one
            idx_path(prefix).unlink(missing_ok=True)
    return documents, tokens, masked


def _encode_all(encoder: _Encoder, chunks: Iterator[Chunk], workers: int) -> Generator[_Encoded]:
    """The chunks' token ids, in order."""
    if workers == 1:
        yield from map(encoder, chunks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoder,))
    pending: deque[Future[_Encoded]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) >= _IN_FLIGHT * workers:  # bounds memory when writing is slower
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process died, most likely for lack of memory; try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(encoder: _Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Do not stay behind when the parent was killed and could not end the pool."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> _Encoded:
    return _worker_encoder(chunk)
