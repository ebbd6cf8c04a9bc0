"""megatron-core's own reader reads ours, ours reads what its builder wrote; equal samples of both.

A million documents, about four minutes: ``pytest -m thorough tests/data/test_megatron_core.py``.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastllm_core import blend
from fastllm_data import GPTDataset, IndexedDataset, IndexedDatasetWriter
from fastllm_data.gpt_dataset import SampleOptions

# numpy's advice to megatron-core on arrays of torch tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def megatron() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of missing apex and transformer-engine
        return pytest.importorskip(
            "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed"
        )


def documents(seed: int, count: int) -> list[list[list[int]]]:
    """Documents of 0 to 3 sequences of 1 to 40 ids."""
    rng = random.Random(seed)
    return [
        [
            [rng.randrange(60000) for _ in range(rng.randint(1, 40))]
            for _ in range(rng.randint(0, 3))
        ]
        for _ in range(count)
    ]


THOROUGH = (pytest.mark.slow, pytest.mark.thorough)
MILLION = pytest.param(10**6, marks=THOROUGH)


@pytest.mark.parametrize("count", [0, 1, 7, 1000, MILLION])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_both_ways(megatron: Any, dtype: Any, count: int, tmp_path: Path) -> None:
    import torch

    content = documents(count, count)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype)
    with IndexedDatasetWriter(ours, np.dtype(dtype).name) as writer:
        for document in content:
            for sequence in document:
                writer.add(sequence)
            writer.end_document()
            flat = torch.IntTensor([t for s in document for t in s])
            builder.add_document(flat, [len(s) for s in document])
    builder.finalize(f"{theirs}.idx")
    for suffix in (".bin", ".idx"):
        a, b = (p.with_suffix(suffix).read_bytes() for p in (ours, theirs))
        assert a == b
    if not any(content):
        return  # megatron-core cannot map an empty .bin
    read = megatron.IndexedDataset(str(ours))
    mine = IndexedDataset(theirs)
    assert len(read) == len(mine) == sum(map(len, content))
    for i in range(len(mine)):
        np.testing.assert_array_equal(read[i], mine[i])
    np.testing.assert_array_equal(read.document_indices, mine.boundaries)


@pytest.fixture(scope="module", params=[1, 2000, MILLION])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of so many documents of 0 to 90 tokens, every ninth of them empty."""
    prefix = tmp_path_factory.mktemp("written") / "x"
    rng = np.random.RandomState(request.param)
    lengths = rng.randint(1, 91, request.param)
    ids = rng.randint(0, 60000, int(lengths.sum())).astype(np.uint16)
    end = 0
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for d, length in enumerate(lengths.tolist()):
            if d % 9 != 1:
                writer.add(ids[end : end + length])
            writer.end_document()
            end += length
    return prefix


def megatron_samples(prefix: Path, seq_len: int, samples: int | None, seed: int, eod: int) -> Any:
    """megatron-core's GPTDataset over all sequences of a dataset."""
    from megatron.core.datasets import gpt_dataset  # pyright: ignore
    from megatron.core.datasets.indexed_dataset import (  # pyright: ignore
        IndexedDataset as TheirDataset,
    )
    from megatron.core.datasets.utils import Split  # pyright: ignore

    # As much of a tokenizer as samples need.
    tokenizer: Any = SimpleNamespace(unique_identifiers={}, pad=-1, eod=eod, vocab_size=60000)
    config = gpt_dataset.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        split="1",
        path_to_cache=str(prefix.with_name("cache")),
        tokenizer=tokenizer,
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    theirs = TheirDataset(str(prefix))
    indices = np.arange(len(theirs), dtype=np.int32)
    return gpt_dataset.GPTDataset(theirs, str(prefix), indices, samples, Split.train, config)


@pytest.mark.parametrize("epochs", [1.0, 1.3, 2.9])
def test_equal_samples(megatron: Any, written: Path, epochs: float) -> None:
    """The three indices, and samples from all over, with EOD mask and positions reset."""
    del megatron  # skips without it
    seq_len, seed, eod = 32, 7, 5
    indexed = IndexedDataset(written)
    samples = None if epochs == 1 else max(1, int(epochs * len(indexed.tokens) / seq_len))
    if len(indexed.tokens) <= seq_len:
        samples = 4  # more epochs than documents
    options = SampleOptions(eod_id=eod, eod_mask_loss=True, reset_position_ids=True)
    numbers = np.arange(len(indexed), dtype=np.int32)
    ours = GPTDataset(indexed, numbers, seq_len, samples, seed, options)
    theirs = megatron_samples(written, seq_len, samples, seed, eod)
    for name in ("document_index", "sample_index", "shuffle_index"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    assert len(ours) == len(theirs)
    for i in np.linspace(0, len(ours) - 1, 200).astype(int).tolist():
        mine, other = ours[i], theirs[i]
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            np.testing.assert_array_equal(mine[name], other[name].numpy(), name)


@pytest.mark.parametrize("size", [1, 60_000, pytest.param(10**7, marks=THOROUGH)])
@pytest.mark.parametrize("datasets", [1, 2, 300, 2000])
def test_equal_blends(megatron: Any, datasets: int, size: int) -> None:
    del megatron
    from megatron.core.datasets import helpers_cpp  # pyright: ignore

    share = np.random.RandomState(datasets).lognormal(0, 1, datasets)
    share /= share.sum()
    index, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers_cpp.build_blending_indices(index, sample, share, datasets, size, False)
    for mine, other in zip(blend(share, size), (index, sample), strict=True):
        np.testing.assert_array_equal(mine, other)
