"""Gradient norm and clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.grad_norm import clip_coefficient, clip_grad_norm_, grad_norm

from .accuracy import DTYPES, randoms
from .random_inputs import CPU, RandomCase, random_cases


def squared_sum(backend: Any, x: torch.Tensor, offset: int = 0) -> float:
    parts = backend.core.squared_sum_parts(x.numel(), backend.cuda)
    partial = backend.empty((parts,), torch.float32)
    backend.core.squared_sum(backend.put(x, offset), partial)
    backend.finish()
    return backend.get(partial).double().sum().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 31, 4099, 70001])
def test_values(backend: Any, count: int, dtype: torch.dtype) -> None:
    (x,) = randoms((count,), dtype=dtype)
    expected = x.double().square().sum().item()
    for offset in (0, 1):
        assert squared_sum(backend, x, offset) == pytest.approx(expected, rel=4e-6)


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    x = case.tensor(case.rows * case.cols)
    expected = x.double().square().sum().item()
    assert squared_sum(CPU, x) == pytest.approx(expected, rel=4e-6)
    x[case.pick(x.numel())] = float("nan")
    assert squared_sum(CPU, x) == pytest.approx(float("nan"), nan_ok=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_propagate(backend: Any, bad: float) -> None:
    (x,) = randoms((1000,), dtype=torch.bfloat16)
    x[777] = bad
    assert squared_sum(backend, x) == pytest.approx(bad, nan_ok=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, dtype: torch.dtype) -> None:
    (x,) = randoms((40000,), dtype=dtype)
    squared_sum(counted, x)
    c = counted.core.counters()
    assert c["read_bytes"] == x.nbytes
    assert c["written_bytes"] == 4 * counted.core.squared_sum_parts(40000, True)
    assert c["sectors"] == c["min_sectors"]


def test_against_torch() -> None:
    grads = randoms((70, 33), (5,), (3, 4, 5), dtype=torch.float32, scale=3.0)
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, 1.5)
    torch.testing.assert_close(clip_coefficient(grad_norm(grads), 1.5), 1.5 / (expected + 1e-6))
    torch.testing.assert_close(clip_grad_norm_(grads, 1.5), expected)
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad)
    before = [g.clone() for g in grads]
    clip_grad_norm_(grads, 100.0)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="grad_norm: no gradients"):
        grad_norm([])
    with pytest.raises(ValueError, match="squared_sum: x has DLPack type code 2 with 64 bits"):
        grad_norm([torch.zeros(3, dtype=torch.float64)])
    with pytest.raises(ValueError, match="squared_sum_parts: expected count >= 0"):
        _core.squared_sum_parts(-1)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastllm.squared_sum.default, (torch.randn(100),))
