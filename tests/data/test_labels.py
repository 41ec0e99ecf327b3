"""Label datasets: one label for each token, -100 where the token is not to be learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neox.data.documents import MASKED, open_documents
from neox.data.indexed import IndexedWriter
from neox.data.loaders import Loaders, build_loaders
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups
from tests.data.datasets import training_config, write_dataset, write_labels

PACKINGS = ("packed", "pack_until_overflow", "unpacked")
LENGTHS = [6, 9, 4, 30, 2, 7, 8, 3, 5, 11]


def build(folder: Path, *, names=("data",), labels=("labels",), **values) -> Loaders:
    paths = [str(folder / name) for name in names]
    given = {f"{split}_data_paths": paths for split in ("train", "valid", "test")}
    given |= {
        f"{split}_label_data_paths": [str(folder / name) for name in labels]
        for split in ("train", "valid", "test")
    }
    config = training_config(folder, data_path=None, split=None, **(given | values))
    return build_loaders(config, ProcessGroups.single(), 0, 0, vocab_size=1000)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_loss_is_of_what_the_labels_say(tmp_path: Path, packing: str, workers: int) -> None:
    random = np.random.default_rng(0)
    texts = write_dataset(tmp_path / "data", LENGTHS, first=1)
    counts = [random.integers(0, 2, size=k) for k in LENGTHS]
    write_labels(tmp_path / "labels", texts, counts)
    counted = dict(zip(np.concatenate(texts).tolist(), np.concatenate(counts), strict=True))
    loaders = build(tmp_path, pack_impl=packing, num_workers=workers)
    padded = 0
    for loader, batches in zip(loaders, (12, 8, 2), strict=True):
        for _ in range(batches):
            batch = next(loader)
            assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.float32]
            for tokens, labels, mask in zip(*(x.tolist() for x in batch), strict=True):
                # Token ids are unique, and 0 is padding.
                following = [*tokens[1:], None]
                for here, label, counts_here in zip(following, labels, mask, strict=True):
                    if here is None:
                        assert not counts_here or counted[label]
                    elif here == 0:
                        padded += 1
                        assert not counts_here
                    else:
                        assert counts_here == counted[here]
                        assert label == (here if counts_here else 0)
    assert (padded > 0) == (packing != "packed")


def test_labels_may_differ_from_the_tokens(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [200])
    write_dataset(tmp_path / "labels", [200], first=500)
    batch = next(build(tmp_path).train)
    assert torch.equal(batch.labels_BS, batch.tokens_BS + 501)
    assert batch.loss_mask_BS.all()


def test_labels_and_end_of_document_masking_add_up(tmp_path: Path) -> None:
    texts = write_dataset(tmp_path / "data", [300], modulo=7)
    write_labels(tmp_path / "labels", texts, [np.arange(300) % 2])
    batch = next(build(tmp_path, eod_mask_loss=True).train)
    without = next(build(tmp_path).train)
    expected = without.loss_mask_BS * (without.tokens_BS != 0)  # 0 is the end of a document
    assert torch.equal(batch.loss_mask_BS, expected)
    assert 0 < expected.sum() < without.loss_mask_BS.sum()


def test_each_dataset_of_a_blend_has_its_own(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 400)):
        write_dataset(tmp_path / name, [400], first=first)
        write_dataset(tmp_path / f"{name}_labels", [400], first=first + 100)
    loaders = build(tmp_path, names=("a", "b"), labels=("a_labels", "b_labels"))
    seen = set()
    for _ in range(12):
        batch = next(loaders.train)
        assert torch.equal(batch.labels_BS, batch.tokens_BS + 101)
        seen |= set((batch.tokens_BS[:, 0] // 400).tolist())
    assert seen == {0, 1}


def test_labels_that_are_not_of_the_text(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", [5, 6, 7])
    cases = {"fewer": [5, 6], "other": [5, 7, 6], "one": [5, 6, 8]}
    for name, lengths in cases.items():
        write_dataset(tmp_path / name, lengths)
    messages = {
        "fewer": "are of 2 documents, the text .*data has 3",
        "other": "document 1 has 7 labels in .*other, but 6 tokens in .*data, and 1 more differ",
        "one": "document 2 has 8 labels in .*one, but 7 tokens in .*data: they were not",
    }
    for name, message in messages.items():
        with pytest.raises(DataError, match=message):
            open_documents(str(tmp_path / "data"), str(tmp_path / name))
    with pytest.raises(DataError, match=r"there is no dataset .*absent"):
        open_documents(str(tmp_path / "data"), str(tmp_path / "absent"))


def write_ids(prefix: Path, ids: list[int], dtype: type) -> None:
    with IndexedWriter(prefix, dtype=np.dtype(dtype)) as writer:
        writer.add(np.array(ids).astype(dtype), np.array([len(ids)]))


@pytest.mark.parametrize(
    ("text", "labels", "dtype", "message"),
    [
        ([1, 2, 3], [1, 2, -7000], np.int32, "document 0 of .*labels holds the id -7000: labels"),
        ([1, -100, 3], [1, 2, 3], np.int32, "data holds the id -100: if these are labels, name"),
        ([1, 2, 3], [1, 2, 1000], np.int32, "labels holds token id 1000 but .* ends at 999"),
        ([1, 2, 3], [1, -100, 3], np.uint16, "65436 but .*; or that is -100 stored in 16 bits"),
        ([1, 2, 1000], [1, 2, 3], np.int32, "document 0 of .*data holds token id 1000 but"),
    ],
)
def test_ids_that_cannot_be(tmp_path: Path, text, labels, dtype: type, message: str) -> None:
    write_ids(tmp_path / "data", text, np.int32)
    write_ids(tmp_path / "labels", labels, dtype)
    documents = open_documents(str(tmp_path / "data"), str(tmp_path / "labels"), 1000)
    with pytest.raises(DataError, match=message):
        documents.read([(0, 0, 3)], 3)


def test_masked_is_what_upstream_writes() -> None:
    assert MASKED == -100
