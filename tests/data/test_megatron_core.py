"""megatron-core's own reader reads ours, and ours reads what its builder wrote."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm_data import IndexedDataset, IndexedDatasetWriter

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


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
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
