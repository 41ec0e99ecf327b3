"""Small datasets on disk, configurations that read them, and a plain reading of their order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neox.config import NeoXConfig, from_dict
from neox.data.indexed import IndexedWriter
from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology


class Replica(ProcessGroups):
    """A data-parallel rank that has nobody to wait for: a test builds them one after another."""

    @classmethod
    def of(cls, rank: int, dp: int) -> Replica:
        return cls(Topology(dp=dp), rank, torch.device("cpu"))

    def barrier(self) -> None:
        pass


def write_dataset(
    prefix: Path, lengths: Sequence[int], *, first: int = 0, modulo: int = 60000
) -> list[np.ndarray]:
    """Documents of the given lengths, whose tokens count up from `first`, below `modulo`."""
    bounds = itertools.pairwise(np.cumsum([first, *lengths]))
    documents = [np.arange(start, end) % modulo for start, end in bounds]
    documents = [document.astype(np.uint16) for document in documents]
    with IndexedWriter(prefix, vocab_size=60000) as writer:
        writer.add(np.concatenate(documents), np.array(lengths))
    return documents


def write_labels(
    prefix: Path, texts: Sequence[np.ndarray], counts: Sequence[Sequence[int]]
) -> None:
    """Labels of documents: the token itself where `counts` holds 1, else -100. As int32 files."""
    with IndexedWriter(prefix, dtype=np.dtype(np.int32)) as writer:
        for text, flags in zip(texts, counts, strict=True):
            labels = np.where(flags, text.astype(np.int32), -100)
            writer.add(labels.astype(np.int32), np.array([len(labels)]))


def training_config(folder: Path, *, world_size: int = 1, **values: Any) -> NeoXConfig:
    """Two micro-batches of 2 per step and rank, 6 steps, validation every 2 of them."""
    defaults = {
        "num_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 1,
        "seq_length": 8,
        "max_position_embeddings": 8,
        "data_path": str(folder / "data"),
        "split": "8,1,1",
        "seed": 7,
        "train_iters": 6,
        "eval_interval": 2,
        "eval_iters": 1,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "tokenizer_type": "CharLevelTokenizer",
        "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    }
    merged = {**defaults, **values}
    given = {name: value for name, value in merged.items() if value is not None}
    return from_dict(given, world_size=world_size)


def naive_order(
    documents: Sequence[np.ndarray], first: int, last: int, num_samples: int, seq: int, seed: int
) -> np.ndarray:
    """The samples of documents `first` to `last` - 1, int64 [N, seq + 1], one token at a time."""
    tokens = sum(len(document) for document in documents[first:last])
    epochs = 1
    while (epochs * tokens - 1) // seq < num_samples:
        epochs += 1
    random = np.random.RandomState(seed)
    order = np.array([n for _ in range(epochs) for n in range(first, last)])
    random.shuffle(order)
    stream = [token for n in order for token in documents[n].tolist()]
    samples = []
    while len(stream) > seq:
        samples.append(stream[: seq + 1])
        stream = stream[seq:]
    shuffled = np.arange(len(samples))
    random.shuffle(shuffled)
    return np.array(samples, dtype=np.int64).reshape(-1, seq + 1)[shuffled]
