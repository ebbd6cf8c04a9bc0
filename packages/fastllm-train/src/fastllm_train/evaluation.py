"""The loss on samples that are not trained on ([eval])."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastllm_train.data import MicroBatch, SampleSource, stack
from fastllm_train.errors import UserError
from fastllm_train.layout import BatchConfig


@dataclass(frozen=True)
class EvalConfig:
    """Every ``every`` steps (0: never) and at the end, over the first ``samples`` samples of the
    validation split (of all there are, when they are fewer)."""

    every: int = 0
    samples: int = 64

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError(f"eval.every={self.every} is negative")
        if self.samples < 1:
            raise UserError(f"eval.samples={self.samples} is not a positive number")

    def due(self, step: int, *, last: bool) -> bool:
        return self.every > 0 and (last or step % self.every == 0)


def validation_batches(
    source: SampleSource, count: int, batch: BatchConfig, dp: int, dp_rank: int, vocab: int
) -> list[MicroBatch]:
    """Replica ``dp_rank``'s micro-batches of the first ``count`` samples, as many on every replica.
    Places left over hold a sample that weighs nothing: the mean is the same in any layout."""
    count = min(count, len(source))
    rounds = -(-count // (batch.micro * dp))
    found = []
    for start in range(rounds):
        first = (start * dp + dp_rank) * batch.micro
        numbers = range(first, first + batch.micro)
        rows = stack([source[i if i < count else 0] for i in numbers], vocab)
        counts = np.array([i < count for i in numbers], dtype=np.float32)
        found.append(replace(rows, loss_mask=rows.loss_mask * counts[:, None]))
    return found


def mean_loss(sums: Sequence[tuple[float, float]]) -> float:
    """Token-weighted mean of (Σ weight * loss, Σ weight) pairs."""
    return sum(loss for loss, _ in sums) / max(sum(weight for _, weight in sums), 1.0)
