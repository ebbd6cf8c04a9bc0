"""Counts, lengths and entropy of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm_data.indexed_dataset import IndexedDataset

COUNT_TOKENS = 1 << 22  # counted at a time
BAR_WIDTH = 40


@dataclass(frozen=True)
class Statistics:
    """``histogram``: (lowest, highest length in tokens, documents), by powers of two."""

    prefix: str
    dtype: str
    documents: int
    empty_documents: int
    sequences: int
    tokens: int
    distinct_tokens: int
    min_length: int
    median_length: float
    mean_length: float
    max_length: int
    unigram_entropy_nats: float
    histogram: list[tuple[int, int, int]]

    def to_dict(self) -> dict[str, Any]:
        return {
            **{k: v for k, v in self.__dict__.items() if k != "histogram"},
            "histogram": [
                {"from": low, "to": high, "documents": count} for low, high, count in self.histogram
            ],
        }

    def to_text(self) -> str:
        rows = [
            ("documents", f"{self.documents:,} ({self.empty_documents:,} empty)"),
            ("sequences", f"{self.sequences:,}"),
            ("tokens", f"{self.tokens:,} as {self.dtype}, {self.distinct_tokens:,} distinct"),
            (
                "length",
                f"min {self.min_length:,}, median {self.median_length:,.0f}, "
                f"mean {self.mean_length:,.1f}, max {self.max_length:,} tokens",
            ),
            ("entropy", f"{self.unigram_entropy_nats:.4f} nats a token (unigram)"),
        ]
        lines = [f"{name:12}{value}" for name, value in rows]
        most = max((count for _, _, count in self.histogram), default=1)
        lines.append("tokens a document:")
        for low, high, count in self.histogram:
            bar = "#" * -(-count * BAR_WIDTH // most)
            lines.append(f"  {low:>10,} to {high:>10,}  {count:>12,}  {bar}")
        return "\n".join(lines)


def statistics(dataset: IndexedDataset) -> Statistics:
    """Reads every token once. Entropy is that of the empirical distribution of single ids, in nats.

    A language model that ignores context reaches this loss at best.
    """
    lengths = document_lengths(dataset)
    counts = count_tokens(dataset)
    total = int(counts.sum())
    shares = counts[counts > 0] / max(total, 1)
    return Statistics(
        prefix=str(dataset.prefix),
        dtype=dataset.dtype.name,
        documents=dataset.documents,
        empty_documents=int((lengths == 0).sum()),
        sequences=len(dataset),
        tokens=total,
        distinct_tokens=int((counts > 0).sum()),
        min_length=int(lengths.min(initial=0) if len(lengths) == 0 else lengths.min()),
        median_length=float(np.median(lengths)) if len(lengths) else 0.0,
        mean_length=total / max(1, len(lengths)),
        max_length=int(lengths.max(initial=0)),
        unigram_entropy_nats=abs(float(-(shares * np.log(shares)).sum())),
        histogram=_histogram(lengths),
    )


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Tokens of each document."""
    ends = np.concatenate([[0], np.cumsum(dataset.lengths, dtype=np.int64)])
    return np.diff(ends[dataset.boundaries])


def count_tokens(dataset: IndexedDataset) -> NDArray[np.int64]:
    """How often each id occurs; the array ends with the largest id."""
    counts = np.zeros(0, dtype=np.int64)
    for first in range(0, len(dataset.tokens), COUNT_TOKENS):
        part = np.bincount(dataset.tokens[first : first + COUNT_TOKENS], minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    return counts


def _histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Bins 0, 1, 2-3, 4-7, …; empty bins at both ends left out."""
    if len(lengths) == 0:
        return []
    # bit_length of each length: 0 for 0, k for 2^(k-1) … 2^k - 1
    bins = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(bins)
    first = int(np.flatnonzero(counts)[0])
    return [
        (0 if k == 0 else 1 << (k - 1), (1 << k) - 1, int(counts[k]))
        for k in range(first, len(counts))
    ]
