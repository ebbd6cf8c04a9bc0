"""Learning rate as a pure function of the step ([schedule])."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastllm_train.errors import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """``steps`` optimizer steps in all; the first ``warmup_steps`` rise linearly from 0."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    steps: int = 100
    warmup_steps: int = 0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"schedule.steps={self.steps} is not a positive number")
        if not 0 <= self.warmup_steps <= self.steps:
            raise UserError(
                f"schedule.warmup_steps={self.warmup_steps} is not between 0 and "
                f"schedule.steps={self.steps}"
            )
        if self.min_lr < 0:
            raise UserError(f"schedule.min_lr={self.min_lr} is negative")


def learning_rate(schedule: ScheduleConfig, peak_lr: float, step: int) -> float:
    """Rate of optimizer step ``step`` (1 is the first).

    Warm-up gives ``peak*step/warmup``; then the rate decays from ``peak_lr`` to ``min_lr``, which
    it reaches at the last step and keeps after it (cosine: Loshchilov & Hutter 2016,
    arXiv:1608.03983, one half period).
    """
    if step <= schedule.warmup_steps:
        return peak_lr * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak_lr
    span = max(1, schedule.steps - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / span)
    left = 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return schedule.min_lr + (peak_lr - schedule.min_lr) * left
