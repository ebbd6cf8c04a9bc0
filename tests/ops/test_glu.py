"""Gated linear units on every backend against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.glu import geglu, swiglu

from .accuracy import DENORMAL, DTYPES, ROUNDING, assert_within
from .random_inputs import CPU, RandomCase, random_cases

ACTIVATIONS = ("silu", "gelu")


def exponent_of(v: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """z and dz/dv of activation(v) = v * sigmoid(z(v))."""
    if activation == "silu":
        return v, torch.ones_like(v)
    scale = 2 * math.sqrt(2 / math.pi)
    return scale * (v + 0.044715 * v**3), scale * (1 + 3 * 0.044715 * v**2)


def arithmetic(z: torch.Tensor) -> torch.Tensor:
    """Relative error of float32: exp(z) has that of its argument, and CUDA's __expf 1.2 |z| ulp."""
    return 4e-6 + 4e-7 * z.abs()


def inputs(count: int, dtype: torch.dtype, scale: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [(torch.randn(count, generator=generator) * scale).to(dtype) for _ in range(3)]


def fwd(
    backend: Any, gate: torch.Tensor, up: torch.Tensor, activation: str, offset: int = 0
) -> torch.Tensor:
    y = backend.empty(tuple(gate.shape), gate.dtype, offset)
    backend.core.glu_fwd(backend.put(gate, offset), backend.put(up), y, activation)
    backend.finish()
    return backend.get(y)


def bwd(
    backend: Any,
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = backend.empty(tuple(gate.shape), gate.dtype)
    dup = backend.empty(tuple(gate.shape), gate.dtype, offset)
    backend.core.glu_bwd(
        backend.put(dy), backend.put(gate), backend.put(up), dgate, dup, activation
    )
    backend.finish()
    return backend.get(dgate), backend.get(dup)


def check(
    backend: Any, gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, activation: str
) -> None:
    dtype = gate.dtype
    g, u, d = gate.double(), up.double(), dy.double()
    z, slope = exponent_of(g, activation)
    s = torch.sigmoid(z)
    relative = ROUNDING[dtype] + arithmetic(z)
    tiny = DENORMAL[dtype] + 1e-37 * (g * u).abs()
    y = fwd(backend, gate, up, activation)
    assert_within(y, g * s * u, (g * s * u).abs() * relative + tiny)

    dgate, dup = bwd(backend, dy, gate, up, activation)
    tiny = DENORMAL[dtype] + 1e-37 * (d.abs() + (d * u * g * slope).abs())
    assert_within(dup, d * g * s, (d * g * s).abs() * relative + tiny)
    # A sum of two terms: float32's error is relative to each.
    second = torch.where(s * (1 - s) > 0, g * s * (1 - s) * slope, 0.0)
    expected = d * u * (s + second)
    bound = expected.abs() * ROUNDING[dtype] + (d * u).abs() * (s + second.abs()) * arithmetic(z)
    assert_within(dgate, expected, bound + tiny)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 64, 1000, 4099])
def test_values(backend: Any, count: int, dtype: torch.dtype, activation: str) -> None:
    gate, up, dy = inputs(count, dtype)
    check(backend, gate, up, dy, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(backend: Any, dtype: torch.dtype, activation: str) -> None:
    sizes = [0.0, 1e-30, 1e-4, 5.0, 16.0, 29.9, 30.1, 87.0, 89.0, 104.0, 1e4, 6e4]
    if dtype != torch.float16:
        sizes += [1e20, 3e38]
    gate = torch.tensor([sign * size for size in sizes for sign in (1, -1)]).to(dtype)
    up = torch.full_like(gate, 0.5)
    dy = torch.full_like(gate, 0.25)
    check(backend, gate, up, dy, activation)


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    count = case.rows * case.cols
    gate, up = (case.tensor(count, index=i) for i in (0, 1))
    dy = case.normal(count, index=2)
    if case.flag:
        gate[case.pick(count)] = float("nan")
    for activation in ACTIVATIONS:
        check(CPU, gate, up, dy, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_where_it_is(backend: Any, activation: str) -> None:
    gate, up, dy = inputs(100, torch.bfloat16)
    gate[3] = float("nan")
    up[50] = float("nan")
    dy[99] = float("nan")
    assert fwd(backend, gate, up, activation).isnan().nonzero().flatten().tolist() == [3, 50]
    dgate, dup = bwd(backend, dy, gate, up, activation)
    assert dgate.isnan().nonzero().flatten().tolist() == [3, 50, 99]
    assert dup.isnan().nonzero().flatten().tolist() == [3, 99]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(backend: Any, dtype: torch.dtype) -> None:
    gate, up, dy = inputs(1024, dtype)
    assert torch.equal(fwd(backend, gate, up, "silu", 1), fwd(backend, gate, up, "silu"))
    for a, b in zip(
        bwd(backend, dy, gate, up, "silu", 1), bwd(backend, dy, gate, up, "silu"), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2 * ROUNDING[dtype], atol=0)


def test_empty(backend: Any) -> None:
    gate, up, dy = inputs(0, torch.float32)
    assert fwd(backend, gate, up, "silu").shape == (0,)
    assert bwd(backend, dy, gate, up, "gelu")[0].shape == (0,)


def test_in_place(backend: Any) -> None:
    gate, up, dy = inputs(777, torch.bfloat16)
    expected = bwd(backend, dy, gate, up, "silu")
    on_device = [backend.put(t) for t in (dy, gate, up)]
    backend.core.glu_bwd(*on_device, on_device[1], on_device[2], "silu")
    backend.finish()
    assert torch.equal(backend.get(on_device[1]), expected[0])
    assert torch.equal(backend.get(on_device[2]), expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, dtype: torch.dtype) -> None:
    gate, up, dy = inputs(4096, dtype)
    fwd(counted, gate, up, "gelu")
    c = counted.core.counters()
    assert (c["read_bytes"], c["written_bytes"]) == (2 * gate.nbytes, gate.nbytes)
    assert c["sectors"] == c["min_sectors"] == 3 * gate.nbytes // 32
    counted.core.clear_counters()
    bwd(counted, dy, gate, up, "gelu")
    c = counted.core.counters()
    assert (c["read_bytes"], c["written_bytes"]) == (3 * gate.nbytes, 2 * gate.nbytes)
    assert c["sectors"] == c["min_sectors"] == 5 * gate.nbytes // 32


def test_binding_refuses() -> None:
    gate, up, y = inputs(16, torch.float32)
    with pytest.raises(ValueError, match='glu_fwd: activation is "relu", expected silu or gelu'):
        _core.glu_fwd(gate, up, y, "relu")
    with pytest.raises(ValueError, match="glu_fwd: up is bfloat16, expected float32"):
        _core.glu_fwd(gate, up.bfloat16(), y, "silu")
    with pytest.raises(ValueError, match="glu_fwd: y overlaps gate"):
        _core.glu_fwd(gate[:8], up[:8], gate[4:12], "silu")
    with pytest.raises(ValueError, match="glu_bwd: dup overlaps dgate"):
        _core.glu_bwd(y, gate, up, y, y, "silu")


# --- the torch operator ------------------------------------------------------------------------


def samples() -> list[torch.Tensor]:
    return [t.view(3, 5, 8).requires_grad_() for t in inputs(120, torch.float32)[:2]]


def test_opcheck() -> None:
    gate, up = samples()
    torch.library.opcheck(torch.ops.fastllm.glu_fwd.default, (gate, up, "silu"))
    arguments = (torch.ones_like(gate), gate.detach(), up.detach(), "gelu")
    torch.library.opcheck(torch.ops.fastllm.glu_bwd.default, arguments)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize(
    ("function", "activation"),
    [
        (swiglu, torch.nn.functional.silu),
        (geglu, lambda g: torch.nn.functional.gelu(g, approximate="tanh")),
    ],
    ids=["swiglu", "geglu"],
)
def test_gradients_through_autograd(
    function: Callable[..., torch.Tensor],
    activation: Callable[[torch.Tensor], torch.Tensor],
    compiler: str | None,
) -> None:
    gate, up = samples()
    run = function
    if compiler is not None:
        run = torch.compile(function, fullgraph=True, backend=compiler)
    # The transpose hands the backward pass a gradient that is not contiguous.
    got = torch.autograd.grad(run(gate, up).transpose(0, 2).sin().sum(), (gate, up))
    gate64, up64 = (t.detach().double().requires_grad_() for t in (gate, up))
    want = torch.autograd.grad((activation(gate64) * up64).sin().sum(), (gate64, up64))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
