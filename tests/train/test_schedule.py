"""Learning-rate schedules against their formulas, in every unit, and how long a run is."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_train.config import build_config
from fastllm_train.errors import UserError
from fastllm_train.layout import BatchConfig
from fastllm_train.schedule import ScheduleConfig, learning_rate, planned_steps

PEAK, LOW = 3e-3, 1e-4
LENGTH, WARMUP, SHARE = 1000, 100, 0.2


def schedule(**values: Any) -> ScheduleConfig:
    base = {"steps": LENGTH, "warmup_steps": WARMUP, "min_lr": LOW, "decay_share": SHARE}
    return ScheduleConfig(**{**base, **values})


def share(step: int) -> float:
    return min(1.0, (step - WARMUP) / (LENGTH - WARMUP))


def decay(step: int) -> float:
    start = LENGTH * (1 - SHARE)
    return min(1.0, max(0.0, (step - start) / (LENGTH - start)))


# The formulas once more, written down apart from the code.
CLOSED_FORMS: dict[tuple[str, str], Any] = {
    ("constant", "linear"): lambda _: PEAK,
    ("linear", "linear"): lambda s: PEAK - (PEAK - LOW) * share(s),
    ("cosine", "linear"): lambda s: (
        (PEAK + LOW) / 2 + (PEAK - LOW) / 2 * math.cos(math.pi * share(s))
    ),
    ("inverse-sqrt", "linear"): lambda s: max(LOW, PEAK * (WARMUP / s) ** 0.5),
    ("wsd", "linear"): lambda s: PEAK - (PEAK - LOW) * decay(s),
    ("wsd", "cosine"): lambda s: (PEAK + LOW) / 2 + (PEAK - LOW) / 2 * math.cos(math.pi * decay(s)),
    ("wsd", "sqrt"): lambda s: PEAK - (PEAK - LOW) * decay(s) ** 0.5,
}


@pytest.mark.parametrize(("kind", "shape"), CLOSED_FORMS)
def test_every_step_has_the_rate_of_the_formula(kind: str, shape: str) -> None:
    config = schedule(kind=kind, decay_shape=shape)
    for step in range(1, LENGTH + 50):
        want = PEAK * step / WARMUP if step <= WARMUP else CLOSED_FORMS[kind, shape](step)
        assert learning_rate(config, PEAK, step) == pytest.approx(want, rel=1e-12), step


@settings(deadline=None)
@given(
    kind=st.sampled_from([kind for kind, _ in CLOSED_FORMS]),
    size=st.integers(1, 64),
    seq_len=st.integers(1, 4096),
    step=st.integers(1, 2 * LENGTH),
)
def test_samples_and_tokens_give_the_rate_of_the_steps_they_are(
    kind: Any, size: int, seq_len: int, step: int
) -> None:
    want = learning_rate(schedule(kind=kind), PEAK, step)
    for unit, per_step in (("samples", size), ("tokens", size * seq_len)):
        lengths = {unit: LENGTH * per_step, f"warmup_{unit}": WARMUP * per_step}
        other = schedule(kind=kind, steps=0, **{"warmup_steps": 0, **lengths})
        position = other.position(step, step * size, seq_len)
        assert learning_rate(other, PEAK, position) == pytest.approx(want, rel=1e-9)
        assert planned_steps(other, BatchConfig(1, size, seq_len)) == LENGTH


def test_no_warm_up_starts_at_the_peak() -> None:
    for kind in ("constant", "wsd", "inverse-sqrt"):
        assert learning_rate(schedule(kind=kind, warmup_steps=0), PEAK, 1) == PEAK


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 5}, "given twice: schedule.steps and schedule.samples"),
        ({"steps": 0, "samples": 500}, "schedule.warmup_steps with schedule.samples"),
        ({"warmup_steps": 1001}, "is not between 0 and schedule.steps=1000"),
        ({"decay_share": 0.0}, "is not in"),
        ({"min_lr": -1.0}, "is negative"),
        ({"steps": -1}, "schedule.steps=-1 is negative"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule(**values)


def test_another_unit_in_an_upper_layer_replaces_the_lower_one() -> None:
    from fastllm_train.config import _merge

    merged = _merge({"schedule": {"steps": 7, "kind": "wsd"}}, {"schedule": {"tokens": 900}})
    assert merged == {"schedule": {"kind": "wsd", "tokens": 900}}
    assert build_config({"model": {"preset": "llama-10m"}}).schedule.length == 100


@settings(deadline=None)
@given(
    start=st.integers(1, 8),
    increment=st.integers(1, 8),
    increments=st.integers(1, 6),
    samples=st.integers(1, 3000),
    steps=st.integers(0, 120),
)
def test_a_growing_batch_follows_megatron_s_rule_and_is_counted_right(
    start: int, increment: int, increments: int, samples: int, steps: int
) -> None:
    full = start + increment * increments
    batch = BatchConfig(1, full, 8, (start, increment, samples))
    consumed = 0
    for done in range(steps):
        # Megatron-LM: RampupBatchsizeNumMicroBatches.update
        past = int(consumed / (samples / increments))
        want = full if consumed > samples else start + min(past, increments) * increment
        assert abs(batch.size_at(consumed) - want) in (0, increment)  # it divides floats
        if (consumed * increments) % samples:
            assert batch.size_at(consumed) == want
        assert batch.samples_after(done) == consumed
        if consumed:
            assert batch.steps_to(consumed) == done
        consumed += batch.size_at(consumed)


def test_a_batch_that_does_not_grow_into_the_whole_one_is_refused() -> None:
    with pytest.raises(UserError, match="do not lead from 4 to"):
        BatchConfig(1, 16, 8, (4, 5, 100))
    with pytest.raises(UserError, match="not three positive numbers"):
        BatchConfig(1, 16, 8, (4, 4))
    with pytest.raises(UserError, match=r"batch\.rampup's start=3 is not a multiple"):
        BatchConfig(2, 16, 8, (3, 1, 100)).accumulation(1)
