"""pack_until_overflow and unpacked: documents in one piece, cut only where one is too long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from neox.data.documents import MASKED, open_documents
from neox.data.samples import Origin, Samples, open_samples
from neox.errors import DataError
from neox.parallel.groups import ProcessGroups
from tests.data.datasets import training_config, write_dataset, write_labels

PACKINGS = ("pack_until_overflow", "unpacked")


def open_all(
    folder: Path,
    packing: str,
    num_samples: int | None,
    *,
    chosen: range | None = None,
    labels: bool = False,
    **values,
) -> Samples:
    config = training_config(folder, pack_impl=packing, **values)
    documents = open_documents(str(folder / "data"), str(folder / "labels") if labels else None)
    chosen = chosen or range(len(documents))
    return open_samples(documents, chosen, num_samples, config, ProcessGroups.single())


def documents_of(samples: Samples) -> list[list[int]]:
    return [[part.document for part in samples.origins(n)] for n in range(len(samples))]


def packed_by_hand(documents: list[int], sizes: list[int], room: int) -> list[list[int]]:
    """One document after another, a new sample whenever the next one does not fit."""
    samples: list[list[int]] = []
    used = room
    for document in documents:
        if used + sizes[document] > room:
            samples.append([])
            used = 0
        samples[-1].append(document)
        used += sizes[document]
    return samples


@pytest.mark.parametrize("case", range(25))
@pytest.mark.parametrize("packing", PACKINGS)
def test_samples_are_documents_and_padding(tmp_path: Path, packing: str, case: int) -> None:
    random = np.random.default_rng(case)
    lengths = random.choice([0, 1, 2, 3, 5, 9, 10, 14, 30], size=random.integers(2, 25)).tolist()
    lengths[0] = 6  # one that will do
    chop = bool(random.integers(2))
    room = 10
    texts = write_dataset(tmp_path / "data", lengths, first=1)
    values = {"seq_length": room - 1, "max_position_embeddings": 16, "allow_chopped": chop}
    num_samples = int(random.integers(1, 60))

    samples = open_all(tmp_path, packing, num_samples, **values)

    usable = [n for n, k in enumerate(lengths) if k >= 2 and (chop or k <= room)]
    assert len(samples) >= num_samples
    for n in range(len(samples)):
        parts = samples.origins(n)
        tokens = np.concatenate([texts[part.document][: part.stop] for part in parts])
        sample = samples[n]
        assert sample.tokens_T.dtype == sample.labels_T.dtype == np.int64
        assert sample.tokens_T.tolist() == [*tokens, *[0] * (room - len(tokens))]
        assert sample.labels_T.tolist() == [*tokens, *[MASKED] * (room - len(tokens))]
        expected = [
            Origin(str(tmp_path / "data"), part.document, 0, min(lengths[part.document], room))
            for part in parts
        ]
        assert parts == expected
    # Each epoch is a permutation of the usable documents, cut up as by hand.
    read = documents_of(samples)
    flat = [document for sample in read for document in sample]
    assert len(flat) % len(usable) == 0
    by_hand = []
    for start in range(0, len(flat), len(usable)):
        epoch = flat[start : start + len(usable)]
        assert sorted(epoch) == usable
        if packing == "unpacked":
            by_hand += [[document] for document in epoch]
        else:
            by_hand += packed_by_hand(epoch, [min(k, room) for k in lengths], room)
    assert read == by_hand


@pytest.mark.parametrize("packing", PACKINGS)
def test_more_samples_are_the_same_ones_and_more(tmp_path: Path, packing: str) -> None:
    """Upstream's order depends on how many are asked for, hence on train_iters."""
    write_dataset(tmp_path / "data", [3, 4, 5, 6, 2, 7])
    few = documents_of(open_all(tmp_path, packing, 1))
    many = documents_of(open_all(tmp_path, packing, 200))
    assert len(many) >= 200
    assert many[: len(few)] == few


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_seed_decides_the_order_and_epochs_differ(tmp_path: Path, packing: str) -> None:
    write_dataset(tmp_path / "data", [9] * 40)
    first = documents_of(open_all(tmp_path, packing, 80))
    assert first == documents_of(open_all(tmp_path, packing, 80))
    assert first != documents_of(open_all(tmp_path, packing, 80, seed=8))
    assert first[:40] != first[40:80]


@pytest.mark.parametrize("packing", PACKINGS)
def test_only_the_chosen_documents_are_read(tmp_path: Path, packing: str) -> None:
    """Upstream's two modes read the first documents of the file for every split."""
    write_dataset(tmp_path / "data", [4] * 30)
    samples = open_all(tmp_path, packing, 50, chosen=range(20, 30))
    assert {n for sample in documents_of(samples) for n in sample} == set(range(20, 30))


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_without_a_label_that_counts_are_left_out(
    tmp_path: Path, packing: str, capsys
) -> None:
    texts = write_dataset(tmp_path / "data", [5, 5, 5, 20, 20, 0], first=1)
    counts = [[0] * 5, [1, 0, 0, 0, 0], [0, 0, 0, 0, 1], [0] * 9 + [1] * 11, [0] * 8 + [1] * 12, []]
    write_labels(tmp_path / "labels", texts, counts)
    samples = open_all(tmp_path, packing, 12, labels=True)  # 9 tokens each
    # 1: only the first, which nothing predicts; 3: only behind where it is cut
    assert {n for sample in documents_of(samples) for n in sample} == {2, 4}
    told = capsys.readouterr().out
    assert "left out 1 shorter than 2 tokens, 3 without a label that counts, of 6" in told
    for n in range(len(samples)):
        tokens = samples[n].tokens_T
        wanted = {2: 15, 4: 44}  # their one label within 9 tokens
        counted = samples[n].labels_T[samples[n].labels_T >= 0].tolist()
        assert counted == [wanted[part.document] for part in samples.origins(n)]
        assert set(counted) <= set(tokens.tolist())


@pytest.mark.parametrize("packing", PACKINGS)
def test_nothing_usable(tmp_path: Path, packing: str) -> None:
    write_dataset(tmp_path / "data", [0, 1, 30, 40])
    message = f"make no sample with pack_impl: {packing}: 2 shorter than 2 tokens, 2 longer than"
    with pytest.raises(DataError, match=message):
        open_all(tmp_path, packing, 1, allow_chopped=False)


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_is_every_document_once(tmp_path: Path, packing: str) -> None:
    write_dataset(tmp_path / "data", [3, 4, 5, 6, 2, 7])
    samples = open_all(tmp_path, packing, None)
    assert sorted(n for sample in documents_of(samples) for n in sample) == list(range(6))


def test_labels_are_counted_the_same_in_chunks(tmp_path: Path, monkeypatch) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(0, 12, size=200).tolist()
    texts = write_dataset(tmp_path / "data", lengths)
    counts = [random.integers(0, 2, size=k).tolist() for k in lengths]
    write_labels(tmp_path / "labels", texts, counts)
    monkeypatch.setattr("neox.data.documents._CHUNK", 50)
    documents = open_documents(str(tmp_path / "data"), str(tmp_path / "labels"))
    for chosen in (range(200), range(17, 150), range(199, 200)):
        found = documents.count_labels(chosen, 6)
        assert found.tolist() == [sum(counts[n][1:6]) for n in chosen]
