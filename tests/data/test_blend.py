"""Blends against the rule itself: the largest w·max(t, 1) − n, the first dataset on ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fastllm_core import blend, exhaustive_blend

Floats = NDArray[np.float64]


def by_the_rule(weights: Floats, size: int, sizes: Floats | None = None) -> NDArray[np.int64]:
    """Every dataset is looked at for every sample."""
    drawn = np.zeros(len(weights))
    order = np.empty(size, dtype=np.int64)
    for t in range(size):
        errors = weights * max(t, 1) - drawn
        if sizes is not None:
            errors[drawn >= sizes] = -np.inf
        order[t] = j = np.argmax(errors)
        drawn[j] += 1
    return order


def check(pair: tuple[Any, Any], expected: NDArray[np.int64], datasets: int) -> None:
    index, sample = pair
    np.testing.assert_array_equal(index, expected)
    for j in range(datasets):
        np.testing.assert_array_equal(sample[index == j], np.arange((index == j).sum()))


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.integers(1, 50) | st.floats(1e-3, 1e3), min_size=1, max_size=60),
    size=st.integers(0, 700),
)
def test_blend(weights: list[float], size: int) -> None:
    share = np.array(weights, dtype=np.float64)
    share /= share.sum()
    check(blend(share, size), by_the_rule(share, size), len(share))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    datasets=st.integers(17, 900),
    spread=st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 100.0]),
    distinct=st.sampled_from([2, 30, 10**6]),
)
def test_blend_of_many(seed: int, datasets: int, spread: float, distinct: int) -> None:
    """Nearly equal, equal and widely spread weights; 1 + spread·u with so many values of u."""
    rng = np.random.RandomState(seed)
    share = 1 + spread * rng.randint(0, distinct, datasets) / distinct
    share /= share.sum()
    check(blend(share, 2500), by_the_rule(share, 2500), datasets)


@pytest.mark.parametrize("kind", ["uniform", "heavy tail", "equal", "few large", "drifting"])
def test_long_blend(kind: str) -> None:
    rng = np.random.RandomState(0)
    weights = {
        "uniform": rng.rand(700) + 0.01,
        "heavy tail": rng.pareto(1.0, 700) + 1e-3,
        "equal": np.ones(700),
        "few large": np.concatenate([np.full(3, 500.0), rng.rand(700)]),
        "drifting": 1 + 0.01 * rng.rand(700),
    }[kind]
    share = weights / weights.sum()
    check(blend(share, 40_000), by_the_rule(share, 40_000), len(share))


@settings(max_examples=80, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=60).filter(any))
def test_exhaustive_blend(sizes: list[int]) -> None:
    array = np.array(sizes, dtype=np.int64)
    share = array / array.sum()
    expected = by_the_rule(share, int(array.sum()), array.astype(np.float64))
    check(exhaustive_blend(array), expected, len(sizes))


@pytest.mark.parametrize("most", [3, 60, 1000])
def test_exhaustive_blend_of_many(most: int) -> None:
    sizes = np.random.RandomState(most).randint(0, most, 400)
    share = sizes / sizes.sum()
    expected = by_the_rule(share, int(sizes.sum()), sizes.astype(np.float64))
    check(exhaustive_blend(sizes), expected, len(sizes))


def assert_same(pair: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    for a, b in zip(pair, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["uniform", "heavy tail", "nearly equal", "in classes"])
def test_threads_do_not_change_a_blend(kind: str) -> None:
    rng = np.random.RandomState(1)
    weights = {
        "uniform": rng.rand(700) + 0.01,
        "heavy tail": rng.pareto(1.0, 700) + 1e-3,
        "nearly equal": 1 + 0.01 * rng.rand(700),
        "in classes": 1.0 + rng.randint(0, 8, 700),
    }[kind]
    share = weights / weights.sum()
    size = 3 << 20
    assert_same(blend(share, size, threads=3), blend(share, size, threads=1))


def test_weights_that_do_not_sum_to_one_take_one_thread() -> None:
    share = np.array([0.1, 0.2, 0.3])
    assert_same(blend(share, 1 << 21, threads=2), blend(share, 1 << 21, threads=1))


def test_threads_do_not_change_an_exhaustive_blend() -> None:
    """With datasets of a few samples the second thread starts wrong and has to be repaired."""
    sizes = np.random.RandomState(0).lognormal(0, 3, 700)
    sizes = (sizes / sizes.sum() * (2.2 * 2**20)).astype(np.int64)
    assert (sizes == 0).any()
    assert_same(exhaustive_blend(sizes, threads=2), exhaustive_blend(sizes, threads=1))
