"""In which order documents are read and cut into samples: pure functions of lengths and a seed.

`lengths` is always int32: the tokens of every document of a dataset.
"""

from __future__ import annotations

import numpy as np

from neox import log

_CHUNK = 1 << 20  # samples


def split_documents(split: str, count: int) -> list[range]:
    """The documents of train, validation and test: `count` divided as `split`, "969, 30, 1", says.

    Each share is rounded for itself, and train takes what that leaves over or short.
    """
    shares = [float(share) for share in split.replace("/", ",").split(",")]
    shares = [*shares, 0.0, 0.0][:3]
    counts = [round(share / sum(shares) * count) for share in shares]
    ends = [sum(counts[: i + 1]) for i in range(3)]
    ends = [max(0, end - (ends[2] - count)) for end in ends]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def epochs_needed(tokens: int, seq_length: int, num_samples: int) -> int:
    """The smallest e >= 1 with (e * tokens - 1) // seq_length >= num_samples.

    n samples take n * seq_length + 1 tokens, because neighbours share one.
    """
    return max(1, -(-(num_samples * seq_length + 1) // tokens))


def stream_order(
    lengths: np.ndarray, documents: range, seq_length: int, epochs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Upstream's `packed`, bit for bit: all documents end to end, cut every `seq_length` tokens.

    Returns (documents int32 [epochs * len(documents)], starts int32 or int64 [samples, 2]), a start
    being a place among those documents and a token's within that document. One generator shuffles
    first the documents, all epochs together, and then the samples.
    """
    random = np.random.RandomState(seed)
    stream = np.tile(np.arange(documents.start, documents.stop, dtype=np.int32), epochs)
    random.shuffle(stream)
    starts = _cuts(lengths[stream], seq_length)
    order = np.arange(len(starts), dtype=np.uint32 if len(starts) < 2**32 - 1 else np.int64)
    random.shuffle(order)
    return stream, starts[order]


def _cuts(lengths: np.ndarray, seq_length: int) -> np.ndarray:
    """(document, token within it) of every `seq_length`-th token of documents end to end: [N, 2].

    As many as there are with `seq_length` more tokens behind them. int32, or int64 where needed.
    """
    sums = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=sums[1:])
    count = max(0, (int(sums[-1]) - 1) // seq_length)
    largest = max(len(lengths), int(lengths.max()))
    cuts = np.empty((count, 2), dtype=np.int32 if largest < 2**31 else np.int64)
    for first in range(0, count, _CHUNK):
        places = np.arange(first, min(first + _CHUNK, count), dtype=np.int64) * seq_length
        found = np.searchsorted(sums, places, side="right") - 1  # the last one: not an empty one
        cuts[first : first + _CHUNK, 0] = found
        cuts[first : first + _CHUNK, 1] = places - sums[found]
    return cuts


def whole_order(
    lengths: np.ndarray, usable: np.ndarray, room: int, num_samples: int, seed: int, *, joined: bool
) -> tuple[np.ndarray, np.ndarray]:
    """At least `num_samples` samples, and whole epochs of them, of documents that are not divided.

    `usable` int32: which documents there are, at least one; `room`: tokens of a sample. With
    `joined` a sample takes documents for as long as they fit, otherwise one each. Returns
    (documents int32, bounds int64 [samples + 1]): sample n is documents bounds[n] to bounds[n + 1].

    Each epoch shuffles the documents anew and ends its last sample, so more samples are the same
    ones and more: unlike in upstream's order, where all depend on how many are asked for.
    """
    random = np.random.RandomState(seed)
    streams: list[np.ndarray] = []
    bounds = [np.zeros(1, dtype=np.int64)]
    samples = 0
    while not streams or samples < num_samples:
        stream = usable.copy()
        random.shuffle(stream)
        if joined:
            ends = _filled(np.minimum(lengths[stream], np.int64(room)), room)
        else:
            ends = np.arange(1, len(stream) + 1, dtype=np.int64)
        bounds.append(ends + bounds[-1][-1])
        streams.append(stream)
        samples += len(ends)
    return np.concatenate(streams), np.concatenate(bounds)


def _filled(sizes: np.ndarray, room: int) -> np.ndarray:
    """int64: where each sample ends that takes the next documents for as long as they fit."""
    sums = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=sums[1:])
    ends = []
    position = 0
    with log.progress(total=len(sizes), desc="packing", unit=" documents") as bar:
        while position < len(sizes):
            ahead = sums[position : position + room + 2]  # no document is empty
            taken = int(np.searchsorted(ahead, ahead[0] + room, "right")) - 1
            position += taken
            ends.append(position)
            bar.update(taken)
    return np.array(ends, dtype=np.int64)
