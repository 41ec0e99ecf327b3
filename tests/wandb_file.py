"""Reads what the wandb library wrote offline: records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, kind
BLOCK = 32768  # no record crosses a block unless it is split
FULL, LAST = 1, 4
OWN = {"_step", "_timestamp", "_runtime"}  # W&B's


def read_wandb_file(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of an offline run's `.wandb` file."""
    data = path.read_bytes()
    position, pending = 7, b""  # after the file's own header
    while position + RECORD_HEADER.size <= len(data):
        if BLOCK - position % BLOCK < RECORD_HEADER.size:  # padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = RECORD_HEADER.unpack_from(data, position)
        position += RECORD_HEADER.size
        pending += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            pending = b""
            yield record


def rows_of(records: Iterable[wandb_internal_pb2.Record]) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of every row of the history, in the order of the file."""
    return [
        (
            record.history.step.num,
            {
                key: json.loads(item.value_json)
                for item in record.history.item
                if (key := item.nested_key[0] if item.nested_key else item.key) not in OWN
            },
        )
        for record in records
        if record.HasField("history")
    ]


def history_of(records: Iterable[wandb_internal_pb2.Record]) -> dict[int, dict[str, float]]:
    """The history by step. An AssertionError when a step is there twice."""
    rows = rows_of(records)
    assert len(rows) == len({step for step, _ in rows}), [step for step, _ in rows]
    return dict(rows)
