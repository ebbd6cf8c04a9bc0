"""Parts of a dataset as datasets of their own: contiguous splits, and random samples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm_data.build import SPLITS, normalize
from fastllm_data.errors import UserError
from fastllm_data.file_copy import append_range
from fastllm_data.indexed_dataset import DTYPES, HEADER, MAGIC, IndexedDataset
from fastllm_data.output import WHERE_TO_WRITE, Target, read_sidecar, sha256_file, write_json
from fastllm_data.statistics import document_lengths

WRITE_ITEMS = 1 << 20
Range = tuple[int, int]  # documents [first, last)


def split_by_shares(dataset: IndexedDataset, shares: Sequence[float]) -> dict[str, Range]:
    """Documents in order: ``train``, ``valid``, ``test`` by up to three shares.

    Bounds are rounded half to even, as Megatron's ``--split`` does. Raises UserError.
    """
    if not 1 <= len(shares) <= len(SPLITS) or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"shares {list(shares)}: give up to three, like 949,50,1")
    ends = np.cumsum(normalize(shares))
    bounds = [0, *(round(float(end) * dataset.documents) for end in ends)]
    bounds[-1] = dataset.documents
    return {
        name: (first, last)
        for name, first, last in zip(SPLITS, bounds, bounds[1:], strict=False)
        if last > first
    }


def split_by_parts(dataset: IndexedDataset, parts: int) -> dict[str, Range]:
    """``parts`` ranges of documents, in order, of about equal numbers of tokens."""
    if parts > max(1, dataset.documents):
        raise UserError(f"{dataset.documents} documents cannot make {parts} parts")
    ends = np.cumsum(document_lengths(dataset))
    total = int(ends[-1]) if len(ends) else 0
    cuts = [int(np.searchsorted(ends, total * k / parts)) for k in range(1, parts)]
    bounds = [0, *cuts, dataset.documents]
    for k in range(1, parts):  # at least one document each
        bounds[k] = min(max(bounds[k], bounds[k - 1] + 1), dataset.documents - (parts - k))
    return {f"{k:05d}-of-{parts:05d}": (bounds[k], bounds[k + 1]) for k in range(parts)}


def sample_documents(
    dataset: IndexedDataset, seed: int, *, count: int | None = None, tokens: int | None = None
) -> list[Range]:
    """Documents drawn without replacement: ``count`` of them, or until there are ``tokens``.

    In the order of the dataset. The same arguments give the same documents.
    """
    order = np.random.default_rng(seed).permutation(dataset.documents)
    if tokens is not None:
        sums = np.cumsum(document_lengths(dataset)[order])
        count = int(np.searchsorted(sums, tokens)) + 1
    chosen = np.sort(order[:count])
    breaks = np.flatnonzero(np.diff(chosen) != 1) + 1
    runs = np.split(chosen, breaks) if len(chosen) else []
    return [(int(run[0]), int(run[-1]) + 1) for run in runs]


def write_subset(
    dataset: IndexedDataset,
    ranges: Sequence[Range],
    out: Path,
    *,
    how: dict[str, Any],
    force: bool = False,
) -> IndexedDataset:
    """Write the documents of ``ranges`` as a dataset; ``how`` goes into its sidecar.

    Raises UserError if ``out`` exists or cannot be written.
    """
    target = Target(out, out.with_name(out.name + ".writing"))
    if target.exists() and not force:
        raise UserError(f"{out} exists", "--force replaces it")
    meta = read_sidecar(dataset.prefix)
    try:
        target.work.mkdir(parents=True, exist_ok=True)
        _write_tokens(dataset, ranges, target.work_file(".bin"))
        _write_index(dataset, ranges, target.work_file(".idx"))
        if meta is not None:
            made = IndexedDataset(target.work_file(""), check=False)
            held = {"documents": made.documents, "tokens": len(made.tokens)}
            meta |= {"job": None, "counts": held, "inputs": [], "subset": how}
            meta["dataset"] = {**held, "sequences": len(made)}
            meta["sha256"] = {s[1:]: sha256_file(target.work_file(s)) for s in (".bin", ".idx")}
            write_json(target.work_file(".meta.json"), meta)
        else:
            target.file(".meta.json").unlink(missing_ok=True)  # it would describe the old dataset
        target.publish()
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}", WHERE_TO_WRITE
        ) from error
    finally:
        shutil.rmtree(target.work, ignore_errors=True)
    return IndexedDataset(out)


def _write_tokens(dataset: IndexedDataset, ranges: Sequence[Range], path: Path) -> None:
    ends = np.concatenate([[0], np.cumsum(document_lengths(dataset))]) * dataset.dtype.itemsize
    with path.open("wb") as file:
        for first, last in ranges:
            append_range(dataset.bin_path, file, int(ends[first]), int(ends[last] - ends[first]))
        file.flush()
        os.fsync(file.fileno())


def _write_index(dataset: IndexedDataset, ranges: Sequence[Range], path: Path) -> None:
    code = next(code for code, known in DTYPES.items() if known == dataset.dtype)
    bounds = dataset.boundaries
    sequences = [(int(bounds[first]), int(bounds[last])) for first, last in ranges]
    total = sum(last - first for first, last in sequences)
    documents = sum(last - first for first, last in ranges)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, total, documents + 1))
        for part in _parts(dataset.lengths, sequences):
            file.write(part.tobytes())
        at = 0
        for part in _parts(dataset.lengths, sequences):
            ends = at + np.cumsum(part.astype(np.int64) * dataset.dtype.itemsize)
            file.write(np.concatenate([[at], ends[:-1]]).astype("<i8").tobytes())
            at = int(ends[-1])
        file.write(np.zeros(1, "<i8").tobytes())
        before = 0
        for (first, last), (begin, end) in zip(ranges, sequences, strict=True):
            for part in _parts(bounds, [(first + 1, last + 1)]):
                file.write((part - begin + before).astype("<i8").tobytes())
            before += end - begin
        file.flush()
        os.fsync(file.fileno())


def _parts(array: NDArray[Any], ranges: Sequence[Range]) -> list[NDArray[Any]]:
    """Views of the ranges, none longer than WRITE_ITEMS."""
    return [
        array[at : min(last, at + WRITE_ITEMS)]
        for first, last in ranges
        for at in range(first, last, WRITE_ITEMS)
    ]
