"""Raw text to tokenized datasets: reading, tokenizing in processes, writing in order."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Protocol

import numpy as np

from neox import log
from neox.data.corpus import Chunk, find_files, read_chunks
from neox.data.indexed import IndexedWriter, token_dtype
from neox.errors import DataError

# Chunks per process that are read, being tokenized or waiting to be written: so none is ever idle.
_IN_FLIGHT = 4
_worker_encoder: _Encoder  # in each process of the pool


class Tokenizer(Protocol):
    """What preprocessing asks of a tokenizer; it is pickled to the worker processes."""

    vocab_size: int
    eod: int

    def tokenize(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Options:
    """What is done to each document."""

    keys: Sequence[str] = ("text",)  # of the JSON objects; each becomes a dataset of its own
    append_eod: bool = False
    fix_text: bool = False  # repair broken encodings with the ftfy package


@dataclass(frozen=True)
class Summary:
    documents: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class _Encoded:
    """One chunk's documents, end to end, for each key."""

    ids: list[np.ndarray]
    lengths: list[np.ndarray]
    bytes_read: int  # as the chunk's


class _Encoder:
    """Turns chunks into token ids; one lives in each process."""

    def __init__(self, tokenizer: Tokenizer, options: Options) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._fix_text = _ftfy() if options.fix_text else None

    def __call__(self, chunk: Chunk) -> _Encoded:
        keys = self._options.keys
        ids: list[list[int]] = [[] for _ in keys]
        lengths: list[list[int]] = [[] for _ in keys]
        for number, texts in chunk.documents(keys):
            if not any(texts):  # an empty document, but one record stays one record of every key
                continue
            for k, text in enumerate(texts):
                tokens = self._encode(chunk, number, text)
                ids[k] += tokens
                lengths[k].append(len(tokens))
        return _Encoded(
            [np.array(tokens, dtype=self._dtype) for tokens in ids],
            [np.array(counts, dtype=np.int32) for counts in lengths],
            chunk.bytes_read,
        )

    def _encode(self, chunk: Chunk, number: int, text: str) -> list[int]:
        if self._fix_text is not None:
            text = self._fix_text(text)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{chunk.path}:{number}: half a surrogate pair, which is no text ({error.reason}); "
                "--ftfy replaces it"
            ) from None
        tokens = self._tokenizer.tokenize(text)
        return [*tokens, self._tokenizer.eod] if self._options.append_eod else tokens


def preprocess(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: Tokenizer,
    options: Options,
    *,
    workers: int = 1,
    num_docs: int | None = None,
    log_interval: int = 100,
) -> Summary:
    """Tokenize `inputs` into {output_prefix}_{key}_document.bin and .idx, one pair per key.

    The files do not depend on `workers`, and appear only when all is done. Memory does not grow
    with the input, but for 4 bytes per document and key. Empty texts make no document. The progress
    bar moves every `log_interval` documents and ends at `num_docs`, or where the share of bytes
    read so far lets expect. DataError for input that cannot be used, naming file and line.
    """
    started = time.monotonic()
    files = find_files(inputs)
    input_bytes = sum(file.stat().st_size for file in files)
    documents = tokens = 0
    with ExitStack() as stack:
        bar = stack.enter_context(
            log.progress(total=num_docs or 0, desc="tokenizing", unit=" docs")
        )
        prefixes = [f"{output_prefix}_{key}_document" for key in options.keys]
        writers = [
            stack.enter_context(IndexedWriter(prefix, tokenizer.vocab_size)) for prefix in prefixes
        ]
        encoder = _Encoder(tokenizer, options)
        results = stack.enter_context(closing(_encode_all(encoder, read_chunks(files), workers)))
        for encoded in results:
            for writer, ids, lengths in zip(writers, encoded.ids, encoded.lengths, strict=True):
                writer.add(ids, lengths)
                tokens += len(ids)
            documents += len(encoded.lengths[0])
            if documents - bar.n >= log_interval:
                bar.total = num_docs or documents * input_bytes // encoded.bytes_read
                bar.update(documents - bar.n)
    return Summary(documents, tokens, time.monotonic() - started)


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


def _ftfy() -> Callable[[str], str]:
    try:
        from ftfy import fix_text
    except ImportError:
        raise DataError("--ftfy needs a package: pip install ftfy") from None
    return fix_text
