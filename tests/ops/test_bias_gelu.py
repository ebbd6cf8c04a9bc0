"""GELU behind a bias on every backend against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.bias_gelu import bias_gelu

from .accuracy import DENORMAL, DTYPES, ROUNDING, assert_within, randoms
from .random_inputs import CPU, RandomCase, random_cases

SCALE = 2 * math.sqrt(2 / math.pi)


def fwd(backend: Any, x: torch.Tensor, bias: torch.Tensor, offset: int = 0) -> torch.Tensor:
    y = backend.empty(tuple(x.shape), x.dtype, offset)
    backend.core.bias_gelu_fwd(backend.put(x, offset), backend.put(bias), y)
    backend.finish()
    return backend.get(y)


def bwd(
    backend: Any, dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = x.shape
    parts = backend.core.bias_gelu_bwd_parts(rows, cols, backend.cuda)
    dx, dbias = backend.empty((rows, cols), x.dtype, offset), backend.empty((cols,), x.dtype)
    backend.core.bias_gelu_bwd(
        backend.put(dy),
        backend.put(x),
        backend.put(bias),
        dx,
        dbias,
        backend.empty((parts, cols), torch.float32),
    )
    backend.finish()
    return backend.get(dx), backend.get(dbias)


def check(backend: Any, x: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor) -> None:
    dtype = x.dtype
    # The sum is rounded to float32, which the kernels start from.
    v = (x.float() + bias.float()).double()
    z = SCALE * (v + 0.044715 * v**3)
    s = torch.sigmoid(z)
    relative = 4e-6 + 4e-7 * z.abs()  # as in test_glu
    tiny = DENORMAL[dtype] + 1e-37 * v.abs()
    y = v * s
    assert_within(fwd(backend, x, bias), y, y.abs() * (ROUNDING[dtype] + relative) + tiny)

    d = dy.double()
    slope = SCALE * (1 + 3 * 0.044715 * v**2)
    second = torch.where(s * (1 - s) > 0, v * s * (1 - s) * slope, 0.0)
    expected = d * (s + second)
    arithmetic = d.abs() * ((s + second.abs()) * relative + 1e-37 * (1 + (v * slope).abs()))
    dx, dbias = bwd(backend, dy, x, bias)
    bound = expected.abs() * ROUNDING[dtype] + arithmetic + DENORMAL[dtype]
    assert_within(dx, expected, bound)
    total = expected.sum(0)
    bound = total.abs() * ROUNDING[dtype] + arithmetic.sum(0) + DENORMAL[dtype]
    assert_within(dbias, total, bound + 4e-6 * expected.abs().sum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (70, 24), (4, 1024), (3, 1100)], ids=str)
def test_values(backend: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, dy, bias = randoms(shape, shape, shape[1:], dtype=dtype, scale=2.0)
    check(backend, x, bias, dy)


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    shape = (case.rows, case.cols)
    x, bias = case.tensor(*shape), case.tensor(case.cols, index=1)
    if case.flag:
        x[case.pick(case.rows), case.pick(case.cols)] = float("nan")
    check(CPU, x, bias, case.normal(*shape, index=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(backend: Any, dtype: torch.dtype) -> None:
    sizes = [0.0, 1e-30, 1e-4, 5.0, 16.0, 29.9, 30.1, 1e4, 6e4]
    x = torch.tensor([[sign * size for size in sizes for sign in (1, -1)]]).to(dtype)
    check(backend, x, torch.zeros(x.shape[1], dtype=dtype), torch.full_like(x, 0.25))


def test_nan_stays_where_it_is(backend: Any) -> None:
    x, dy, bias = randoms((6, 40), (6, 40), (40,), dtype=torch.bfloat16)
    x[1, 3] = float("nan")
    assert fwd(backend, x, bias).isnan().nonzero().tolist() == [[1, 3]]
    dx, dbias = bwd(backend, dy, x, bias)
    assert dx.isnan().nonzero().tolist() == [[1, 3]]
    assert dbias.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_and_in_place(backend: Any, dtype: torch.dtype) -> None:
    x, dy, bias = randoms((7, 264), (7, 264), (264,), dtype=dtype)
    torch.testing.assert_close(fwd(backend, x, bias, 1), fwd(backend, x, bias))
    dx, dbias = bwd(backend, dy, x, bias)
    torch.testing.assert_close(bwd(backend, dy, x, bias, 1)[0], dx)
    arrays = [backend.put(t) for t in (dy, x, bias)]
    got = backend.empty((264,), dtype)
    parts = backend.core.bias_gelu_bwd_parts(7, 264, backend.cuda)
    partial = backend.empty((parts, 264), torch.float32)
    backend.core.bias_gelu_bwd(*arrays, arrays[0], got, partial)
    backend.finish()
    assert torch.equal(backend.get(arrays[0]), dx)
    assert torch.equal(backend.get(got), dbias)


def test_no_rows(backend: Any) -> None:
    x, bias = randoms((0, 16), (16,), dtype=torch.float32)
    assert fwd(backend, x, bias).shape == (0, 16)
    assert not bwd(backend, x, x, bias)[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, dtype: torch.dtype) -> None:
    x, dy, bias = randoms((64, 2048), (64, 2048), (2048,), dtype=dtype)
    fwd(counted, x, bias)
    c = counted.core.counters()
    assert c["unique_read_bytes"] == x.nbytes + bias.nbytes
    assert c["written_bytes"] == x.nbytes
    assert c["sectors"] == c["min_sectors"]
    counted.core.clear_counters()
    bwd(counted, dy, x, bias)
    c = counted.core.counters()
    partial = 4 * counted.core.bias_gelu_bwd_parts(64, 2048, True) * 2048
    assert c["unique_read_bytes"] == 2 * x.nbytes + bias.nbytes + partial
    assert c["written_bytes"] == x.nbytes + bias.nbytes + partial
    assert c["sectors"] <= 1.05 * c["min_sectors"]


def test_binding_refuses() -> None:
    x, bias = randoms((4, 8), (8,), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"bias_gelu_fwd: bias has shape \(7,\), expected \(8,\)"):
        _core.bias_gelu_fwd(x, bias[:7], torch.empty_like(x))
    with pytest.raises(ValueError, match="bias_gelu_fwd: y overlaps x"):
        _core.bias_gelu_fwd(x[:2], bias, x.flatten()[8:24].view(2, 8))


# --- the torch operator ------------------------------------------------------------------------


def test_opcheck() -> None:
    x, bias, dy = randoms((3, 5, 8), (8,), (3, 5, 8), dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastllm.bias_gelu_bwd.default, (dy, x, bias))
    arguments = (x.requires_grad_(), bias.requires_grad_())
    torch.library.opcheck(torch.ops.fastllm.bias_gelu_fwd.default, arguments)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_gradients_through_autograd(compiler: str | None) -> None:
    leaves = [t.requires_grad_() for t in randoms((3, 5, 8), (8,), dtype=torch.float32)]
    run: Any = bias_gelu
    if compiler is not None:
        run = torch.compile(bias_gelu, fullgraph=True, backend=compiler)
    got = torch.autograd.grad(run(*leaves).transpose(0, 2).sin().sum(), leaves)
    x, bias = (t.detach().double().requires_grad_() for t in leaves)
    y = torch.nn.functional.gelu(x + bias, approximate="tanh")
    want = torch.autograd.grad(y.sin().sum(), (x, bias))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
