"""The reader: what it gives, and that it finds what is wrong with a file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_data import IndexedDataset, IndexedDatasetWriter, UserError
from fastllm_data.indexed_dataset import HEADER

DOCUMENTS = [[[1, 2, 3], [4]], [], [[5, 6]], [[7, 8, 9, 10, 11]]]


def write(prefix: Path, documents: list[list[list[int]]], dtype: str = "uint16") -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            for sequence in document:
                writer.add(sequence)
            writer.end_document()
    return prefix


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=3), max_size=8
    ),
    dtype=st.sampled_from(["uint16", "int32"]),
)
def test_round_trip(
    documents: list[list[list[int]]], dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dataset = IndexedDataset(write(tmp_path_factory.mktemp("d") / "x", documents, dtype))
    assert dataset.dtype == np.dtype(dtype)
    assert dataset.documents == len(documents)
    sequences = [s for document in documents for s in document]
    assert [dataset[i].tolist() for i in range(len(dataset))] == sequences
    flat = [[t for s in document for t in s] for document in documents]
    assert [dataset.document(d).tolist() for d in range(dataset.documents)] == flat


def test_parts_and_views(tmp_path: Path) -> None:
    dataset = IndexedDataset(write(tmp_path / "x", DOCUMENTS))
    assert dataset.get(3, 1, 3).tolist() == [8, 9, 10]
    assert dataset[-1].tolist() == [7, 8, 9, 10, 11]
    assert not dataset[0].flags.writeable
    assert np.shares_memory(dataset[0], dataset.tokens)
    for offset, length in ((0, 6), (-1, 2), (5, 1), (2, -1)):
        with pytest.raises(IndexError):
            dataset.get(3, offset, length)
    with pytest.raises(IndexError):
        dataset[4]


def opens(prefix: Path) -> bool:
    try:
        IndexedDataset(prefix)
    except UserError:
        return False
    return True


def test_every_byte_of_the_index_matters(tmp_path: Path) -> None:
    """Any change of any byte of the index is refused, or is one that a reader cannot know of.

    What cannot be known: where inside a run of equal document boundaries a document ends, and the
    dtype code among those of the same size.
    """
    prefix = write(tmp_path / "x", DOCUMENTS)
    path = tmp_path / "x.idx"
    good = path.read_bytes()
    boundaries_at = len(good) - 8 * 5
    missed: list[int] = []
    for at in range(len(good)):
        for change in (1, 0x80, 0xFF):
            data = bytearray(good)
            data[at] ^= change
            path.write_bytes(data)
            if opens(prefix):
                missed.append(at)
    # byte 17: uint16 (8) ^ 1, 0x80 or 0xFF is no integer dtype; so only inner boundaries remain.
    assert all(at >= boundaries_at + 8 and at < len(good) - 8 for at in missed), missed
    assert len(set(missed)) <= 3, missed


def test_any_other_size_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    for suffix in (".idx", ".bin"):
        path = tmp_path / f"x{suffix}"
        good = path.read_bytes()
        sizes = [0, 1, 8, HEADER.size - 1, len(good) // 2, len(good) - 2, len(good) - 1]
        for data in [good[:n] for n in sizes if n < len(good)] + [good + b"\0", good + good]:
            path.write_bytes(data)
            with pytest.raises(UserError, match=r"x\.(idx|bin)"):
                IndexedDataset(prefix)
        path.write_bytes(good)
    IndexedDataset(prefix)


def test_random_damage_never_crashes(tmp_path: Path) -> None:
    """A damaged index is refused, or every access still stays inside the files."""
    prefix = write(tmp_path / "x", DOCUMENTS)
    path = tmp_path / "x.idx"
    good = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + 8] = rng.randbytes(min(rng.choice([1, 4, 8]), len(data) - at))
        path.write_bytes(data)
        try:
            dataset = IndexedDataset(prefix)
        except UserError:
            refused += 1
            continue
        for d in range(dataset.documents):
            dataset.document(d)
    assert refused > 1200


def test_obsolete_and_foreign_files(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", DOCUMENTS)
    (tmp_path / "x.idx").write_bytes(b"TNTIDX\0\0" + bytes(100))
    with pytest.raises(UserError, match="obsolete"):
        IndexedDataset(prefix)
    with pytest.raises(UserError, match="no such file"):
        IndexedDataset(tmp_path / "y")


def test_writer_refuses_ids_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(OverflowError), IndexedDatasetWriter(tmp_path / "x") as writer:
        writer.add([65536])
    assert list(tmp_path.iterdir()) == []
