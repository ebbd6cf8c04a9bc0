"""A run's length and its learning rate, a pure function of how far it has come ([schedule])."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastllm_train.errors import UserError

if TYPE_CHECKING:
    from fastllm_train.layout import BatchConfig

UNITS = ("steps", "samples", "tokens")
DEFAULT_STEPS = 100


@dataclass(frozen=True)
class ScheduleConfig:
    """The run's length is one of ``steps``, ``samples`` and ``tokens`` (none: 100 steps), and the
    rate is a function of that many; the first ``warmup_<same unit>`` rise linearly from 0.

    ``kind`` "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395) stays at the peak and
    falls over the last ``decay_share`` of the run along ``decay_shape``.
    """

    kind: Literal["constant", "linear", "cosine", "inverse-sqrt", "wsd"] = "cosine"
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    warmup_steps: int = 0
    warmup_samples: int = 0
    warmup_tokens: int = 0
    min_lr: float = 0.0
    decay_share: float = 0.1
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"

    def __post_init__(self) -> None:
        for name in (*UNITS, *(f"warmup_{unit}" for unit in UNITS)):
            if getattr(self, name) < 0:
                raise UserError(f"schedule.{name}={getattr(self, name)} is negative")
        given = [f"schedule.{unit}" for unit in UNITS if getattr(self, unit)]
        if len(given) > 1:
            raise UserError(f"the run's length is given twice: {' and '.join(given)}")
        if not given:
            object.__setattr__(self, "steps", DEFAULT_STEPS)
        for unit in UNITS:
            if unit != self.unit and getattr(self, f"warmup_{unit}"):
                raise UserError(
                    f"schedule.warmup_{unit} with schedule.{self.unit}: both need one unit",
                    hint=f"set schedule.warmup_{self.unit} instead",
                )
        if self.warmup > self.length:
            raise UserError(
                f"schedule.warmup_{self.unit}={self.warmup} is not between 0 and "
                f"schedule.{self.unit}={self.length}"
            )
        if self.min_lr < 0:
            raise UserError(f"schedule.min_lr={self.min_lr} is negative")
        if not 0 < self.decay_share <= 1:
            raise UserError(f"schedule.decay_share={self.decay_share} is not in (0, 1]")

    @property
    def unit(self) -> str:
        return next((unit for unit in UNITS if getattr(self, unit)), "steps")

    @property
    def length(self) -> int:
        """Of the run, in ``unit``."""
        return int(getattr(self, self.unit))

    @property
    def warmup(self) -> int:
        """In ``unit``."""
        return int(getattr(self, f"warmup_{self.unit}"))

    def position(self, step: int, consumed: int, seq_len: int) -> int:
        """How far a run is after ``step`` steps of ``consumed`` samples in all, in ``unit``."""
        return {"steps": step, "samples": consumed, "tokens": consumed * seq_len}[self.unit]


def planned_steps(schedule: ScheduleConfig, batch: BatchConfig) -> int:
    """Steps of the whole run when nothing is skipped."""
    if schedule.unit == "steps":
        return schedule.length
    per_sample = batch.seq_len if schedule.unit == "tokens" else 1
    return batch.steps_to(-(-schedule.length // per_sample))


def learning_rate(schedule: ScheduleConfig, peak_lr: float, position: int) -> float:
    """Rate of the optimizer step that ends at ``position`` (in the schedule's unit; with steps, 1
    is the first).

    Warm-up gives ``peak*position/warmup``. Then, with x the share of the rest that is done:

    - linear and cosine fall from ``peak_lr`` to ``min_lr``, which they reach at the end and keep:
      ``min + (peak - min)*(1 - x)`` and ``min + (peak - min)*(1 + cos(pi*x))/2`` (Loshchilov &
      Hutter 2016, arXiv:1608.03983, one half period);
    - inverse-sqrt is ``peak*sqrt(warmup/position)``, at least ``min_lr`` (Vaswani et al. 2017,
      arXiv:1706.03762, section 5.3; a warm-up of 0 counts as 1);
    - wsd stays and, with y the share of the decay that is done, falls with ``1 - y``,
      ``(1 + cos(pi*y))/2`` or ``1 - sqrt(y)`` (Haegele et al. 2024, arXiv:2405.18392).
    """
    warmup, length = schedule.warmup, schedule.length
    if position <= warmup:
        return peak_lr * position / warmup
    if schedule.kind == "constant":
        return peak_lr
    if schedule.kind == "inverse-sqrt":
        return max(schedule.min_lr, peak_lr * math.sqrt(max(1, warmup) / position))
    start, shape = warmup, schedule.kind
    if schedule.kind == "wsd":
        start, shape = max(warmup, length * (1.0 - schedule.decay_share)), schedule.decay_shape
    done = min(1.0, max(0.0, position - start) / max(1.0, length - start))
    left = {
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "sqrt": 1.0 - math.sqrt(done),
    }[shape]
    return schedule.min_lr + (peak_lr - schedule.min_lr) * left
