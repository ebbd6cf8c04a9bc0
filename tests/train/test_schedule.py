"""Learning-rate schedules at the points that define them."""

from __future__ import annotations

import math

import pytest

from fastllm_train.schedule import ScheduleConfig, learning_rate


def rates(kind: str, **values: float) -> list[float]:
    schedule = ScheduleConfig(kind=kind, steps=20, warmup_steps=4, min_lr=0.1)  # type: ignore[arg-type]
    return [learning_rate(schedule, 1.0, step) for step in range(1, 25)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert rates("cosine")[:4] == [0.25, 0.5, 0.75, 1.0]


def test_constant_stays_at_the_peak() -> None:
    assert set(rates("constant")[3:]) == {1.0}


def test_linear_falls_evenly_to_min_lr() -> None:
    falls = [a - b for a, b in zip(rates("linear")[3:19], rates("linear")[4:20], strict=True)]
    assert falls == pytest.approx([0.9 / 16] * 16)


def test_cosine_is_half_way_at_half_time_and_ends_at_min_lr() -> None:
    got = rates("cosine")
    assert got[11] == pytest.approx(0.1 + 0.9 * 0.5)
    assert got[7] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert got[19:] == pytest.approx([0.1] * 5)
