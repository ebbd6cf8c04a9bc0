"""From data paths and a split to the three datasets of a run."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastllm_data.blend import BlendedDataset
from fastllm_data.errors import UserError
from fastllm_data.gpt_dataset import GPTDataset, SampleOptions
from fastllm_data.indexed_dataset import IndexedDataset

Dataset = GPTDataset | BlendedDataset
SPLITS = ("train", "valid", "test")
# A blend asks each dataset for this much more than its share, as Megatron-Core does.
SURPLUS = 0.005


@dataclass(frozen=True)
class Blend:
    """Prefixes and, if any were given, their weights."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(paths: Sequence[str | float | Path]) -> Blend:
    """``[prefix, …]`` or ``[weight, prefix, weight, prefix, …]``. Raises UserError if empty."""
    items = [str(item) for item in paths]
    if not items:
        raise UserError("no data paths are given")
    weights = [_number(item) for item in items[::2]]
    if len(items) % 2 == 0 and all(weight is not None for weight in weights):
        numbers = tuple(weight for weight in weights if weight is not None)
        if any(not math.isfinite(w) or w <= 0 for w in numbers):
            raise UserError(f"data weights must be positive: {items[::2]}")
        return Blend(tuple(items[1::2]), numbers)
    return Blend(tuple(items), None)


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1. By numpy: since Python 3.12 the built-in sum rounds differently."""
    array = np.array(weights, dtype=np.float64)
    return (array / array.sum()).tolist()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_split(split: str) -> list[tuple[float, float] | None]:
    """``"949,50,1"`` → each split's range as shares of the documents; None for an empty one."""
    parts = [float(part) for part in re.findall(r"[.0-9]+", split)]
    if not parts or len(parts) > len(SPLITS) or sum(parts) <= 0:
        raise UserError(f"split {split!r}: give up to three shares, like 949,50,1")
    parts += [0.0] * (len(SPLITS) - len(parts))
    bounds: list[tuple[float, float] | None] = []
    low = 0.0
    for share in normalize(parts):
        high = low + share
        bounds.append((low, min(high, 1.0)) if high > low else None)
        low = high
    return bounds


def split_documents(sequences: int, bounds: tuple[float, float]) -> NDArray[np.int32]:
    """Sequence numbers of a split; the bounds are rounded half to even, as Python's round does."""
    low, high = (round(bound * float(sequences)) for bound in bounds)
    return np.arange(low, high, dtype=np.int32)


def build_datasets(
    paths: Sequence[str | float | Path],
    split: str,
    seq_len: int,
    num_samples: Sequence[int | None],
    seed: int,
    cache_dir: str | Path | None = None,
    options: SampleOptions | None = None,
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """The train, valid and test datasets; None where the split gives nothing or 0 are asked for.

    paths: prefixes, or weight, prefix, weight, prefix, …
    split: shares of the documents, like "949,50,1".
    num_samples: samples needed of train, valid, test; None: one epoch.
    cache_dir: a folder, which ranks on several hosts may share, where indices are kept; None:
    nowhere.

    Raises UserError for files that are wrong and splits that have no sample.
    """
    base = SampleOptions() if options is None else options
    blend = parse_blend(paths)
    bounds = parse_split(split)
    if len(num_samples) != len(SPLITS):
        raise UserError("num_samples needs three values: train, valid, test")
    indexed = [IndexedDataset(prefix) for prefix in blend.prefixes]
    built: list[Dataset | None] = []
    for name, bound, wanted in zip(SPLITS, bounds, num_samples, strict=True):
        if bound is None or wanted == 0:
            built.append(None)
            continue
        # Only validation may keep a last sample that is not full.
        adjusted = base if name == "valid" else replace(base, drop_last=True)
        built.append(_one_split(indexed, blend, bound, wanted, seq_len, seed, adjusted, cache_dir))
    train, valid, test = built
    return train, valid, test


def _one_split(
    indexed: list[IndexedDataset],
    blend: Blend,
    bounds: tuple[float, float],
    wanted: int | None,
    seq_len: int,
    seed: int,
    options: SampleOptions,
    cache_dir: str | Path | None,
) -> Dataset:
    def one(source: IndexedDataset, samples: int | None) -> GPTDataset:
        documents = split_documents(len(source), bounds)
        return GPTDataset(source, documents, seq_len, samples, seed, options, cache_dir)

    if len(indexed) == 1:
        return one(indexed[0], wanted)
    weights = None if blend.weights is None else normalize(blend.weights)
    counts: list[int | None] = [None] * len(indexed)
    size = wanted
    if weights is not None and wanted is not None:
        shares = [math.ceil(wanted * weight) for weight in weights]
        counts = [math.ceil(share * (1 + SURPLUS)) for share in shares]
        size = sum(shares)
    # Building is native code without the GIL.
    with ThreadPoolExecutor(min(len(indexed), os.cpu_count() or 1)) as pool:
        datasets = list(pool.map(one, indexed, counts))
    # The blend normalizes once more, which in floating point may change a bit; so does Megatron.
    # Not for a blend of whole datasets: there the weights are as given.
    given = blend.weights if wanted is None else weights
    return BlendedDataset(datasets, given, size, cache_dir)
