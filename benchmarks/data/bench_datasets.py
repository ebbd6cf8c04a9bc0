"""Indices, blends and samples for training; against megatron-core where it is installed.

    python benchmarks/data/bench_datasets.py [--peer]

Each figure is the best of some runs in one process. Lengths of documents are lognormal with mean
1,483 and median 600 tokens, as in a corpus of 100 MB of mixed text; token ids are random. `--peer`
measures megatron-core's compiled functions in the same run and compares the results
(`pip install --no-deps megatron-core`, and torch).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm_core import blend, gpt_indices
from fastllm_data import GPTDataset, IndexedDataset
from fastllm_data.gpt_dataset import SampleOptions, plan_samples
from fastllm_data.indexed_dataset import IndexedDatasetWriter


def best_of(runs: int, body: Callable[[], Any]) -> float:
    seconds: list[float] = []
    for _ in range(runs):
        started = time.perf_counter()
        body()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def lengths_of(tokens: int, seed: int = 0) -> NDArray[np.int32]:
    rng = np.random.RandomState(seed)
    count = int(tokens / 1483)
    drawn = rng.lognormal(np.log(600), np.sqrt(2 * np.log(1483 / 600)), count)
    return np.maximum(drawn * (tokens / drawn.sum()), 1).astype(np.int32)


def show(what: str, value: str, aim: str, peer: str = "") -> None:
    print(f"| {what} | {value} | {aim} | {peer} |", flush=True)


def bench_indices(peer: Any) -> None:
    lengths = lengths_of(10**10)
    documents = np.arange(len(lengths), dtype=np.int32)
    total, seq_len = int(lengths.sum(dtype=np.int64)), 4096
    plan = plan_samples(total, seq_len, None, SampleOptions())

    def ours() -> Any:
        return gpt_indices(
            lengths=lengths, documents=documents, epochs=1, separate=False, seq_length=seq_len,
            extra=1, samples=plan.samples, first_part=plan.samples, seed=1234,
        )  # fmt: skip

    def theirs() -> tuple[Any, Any, Any]:
        rng = np.random.RandomState(1234)
        order = documents.copy()
        rng.shuffle(order)
        rows = peer.build_sample_idx_int32(lengths, order, seq_len, 1, total, True, True)
        shuffled = np.arange(plan.samples, dtype=np.uint32)
        rng.shuffle(shuffled)
        return order, rows, shuffled

    seconds = best_of(5, ours)
    said = ""
    if peer:
        for a, b in zip(ours(), theirs(), strict=True):
            np.testing.assert_array_equal(a, b)
        said = f"{best_of(3, theirs):.3f} s"
    what = f"three indices of {total:.3g} tokens, {len(lengths):,} documents, {seq_len} a sample"
    show(what, f"{seconds:.3f} s", "0.3 s", said)


def blend_by_peer(peer: Any, share: NDArray[np.float64], size: int) -> float:
    index, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    started = time.perf_counter()
    peer.build_blending_indices(index, sample, share, len(share), size, False)
    seconds = time.perf_counter() - started
    for a, b in zip(blend(share, size), (index, sample), strict=True):
        np.testing.assert_array_equal(a, b)
    return seconds


def bench_blend(peer: Any) -> None:
    rng = np.random.RandomState(0)
    kinds = {
        "uniform weights": rng.rand(1000) + 0.01,
        "lognormal weights": rng.lognormal(0, 1, 1000),
        "weights within 1 %": 1 + 0.01 * rng.rand(1000),
        "8 different weights": 1.0 + rng.randint(0, 8, 1000),
        "equal weights": np.ones(1000),
    }
    size = 10_000_000
    for kind, weights in kinds.items():
        share = weights / weights.sum()
        seconds = best_of(3, lambda share=share: blend(share, size))
        said = ""
        if peer and kind == "uniform weights":
            said = f"{blend_by_peer(peer, share, size):.2f} s"
        show(f"blend of 10 M samples, 1,000 datasets, {kind}", f"{seconds:.3f} s", "0.3 s", said)


def bench_samples(folder: Path) -> None:
    prefix, rng = folder / "x", np.random.RandomState(0)
    with IndexedDatasetWriter(prefix) as writer:
        for length in lengths_of(50_000_000).tolist():
            ids = rng.randint(3, 50257, length)
            ids[-1] = 2
            writer.add(ids)
            writer.end_document()
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed), dtype=np.int32)
    for name, options in {
        "plain": SampleOptions(eod_id=2),
        "EOD mask, positions reset": SampleOptions(
            eod_id=2, eod_mask_loss=True, reset_position_ids=True
        ),
        "packed: cu_seqlens": SampleOptions(packed=True),
    }.items():
        dataset = GPTDataset(indexed, documents, 2048, None, 1, options)
        count = len(dataset)

        def read_all(dataset: GPTDataset = dataset, count: int = count) -> None:
            for i in range(count):
                dataset[i]

        micros = best_of(5, read_all) / count * 1e6
        show(f"item of 2,048 tokens, random documents, {name}", f"{micros:.2f} µs", "10 µs")


def bench_cache(folder: Path) -> None:
    prefix = folder / "y"
    lengths = lengths_of(10**10)
    # Only the index is read here, so the .bin may be a hole.
    from fastllm_data.indexed_dataset import HEADER, MAGIC

    ends = np.cumsum(lengths.astype(np.int64)) * 2
    with (folder / "y.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, len(lengths), len(lengths) + 1))
        file.write(lengths.tobytes() + np.concatenate([[0], ends[:-1]]).tobytes())
        file.write(np.arange(len(lengths) + 1).tobytes())
    with (folder / "y.bin").open("wb") as file:
        file.truncate(int(ends[-1]))
    documents = np.arange(len(lengths), dtype=np.int32)
    opened = best_of(3, lambda: IndexedDataset(prefix))
    show(f"opening and checking an .idx of {len(lengths):,} documents", f"{opened:.3f} s", "")

    def load() -> None:
        GPTDataset(IndexedDataset(prefix, check=False), documents, 4096, None, 1, None, folder)

    first, again = best_of(1, load), best_of(3, load)
    show("its indices, built and written to the cache", f"{first:.3f} s", "")
    show("its indices from the cache, contents hashed and checked", f"{again:.3f} s", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--peer", action="store_true", help="measure megatron-core's helpers too")
    parser.add_argument("--only", default="indices,blend,samples,cache")
    args = parser.parse_args()
    peer: Any = None
    if args.peer:
        from megatron.core.datasets import helpers_cpp  # pyright: ignore

        peer = helpers_cpp
    print("| what | fastllm | aim | megatron-core |\n| --- | --- | --- | --- |")
    wanted = args.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        if "indices" in wanted:
            bench_indices(peer)
        if "blend" in wanted:
            bench_blend(peer)
        if "samples" in wanted:
            bench_samples(Path(folder))
        if "cache" in wanted:
            bench_cache(Path(folder))


if __name__ == "__main__":
    main()
