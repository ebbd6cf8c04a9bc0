"""LayerNorm on every backend against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastllm_core import _core
from fastllm_train.ops.layernorm import layernorm, layernorm_residual

from .accuracy import ARITHMETIC, DTYPES, assert_within, randoms, rounded
from .random_inputs import CPU, RandomCase, random_cases

EPS = 1e-5
SHAPES = (
    (5, 512),
    (3, 1000),
    (2, 4096),
    (1, 1),
    (9, 33),
    (70, 24),
    (2, 4097),
    (1, 20000),
)


class Fwd(NamedTuple):
    y: torch.Tensor
    h: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor


def tensors(rows: int, cols: int, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """Weight and bias (cols,), and ``count`` tensors (rows, cols)."""
    return randoms(*[(cols,)] * 2, *[(rows, cols)] * count, dtype=dtype)


def fwd(
    backend: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    offset: int = 0,
) -> Fwd:
    y = backend.empty(tuple(x.shape), x.dtype, offset)
    h = None if residual is None else backend.empty(tuple(x.shape), x.dtype)
    mean, rstd = (backend.empty((x.shape[0],), torch.float32) for _ in range(2))
    backend.core.layernorm_fwd(
        backend.put(x, offset),
        None if residual is None else backend.put(residual),
        backend.put(weight),
        None if bias is None else backend.put(bias),
        y,
        h,
        mean,
        rstd,
        EPS,
    )
    backend.finish()
    got_h = x if h is None else backend.get(h)
    return Fwd(backend.get(y), got_h, backend.get(mean), backend.get(rstd))


def bwd(
    backend: Any,
    dy: torch.Tensor,
    got: Fwd,
    weight: torch.Tensor,
    dh: torch.Tensor | None,
    with_bias: bool = True,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rows, cols = got.h.shape
    parts = backend.core.layernorm_bwd_parts(rows, cols, backend.cuda)
    dx = backend.empty((rows, cols), got.h.dtype)
    dweight = backend.empty((cols,), got.h.dtype)
    dbias = backend.empty((cols,), got.h.dtype) if with_bias else None
    backend.core.layernorm_bwd(
        backend.put(dy, offset),
        backend.put(got.h),
        backend.put(weight),
        backend.put(got.mean),
        backend.put(got.rstd),
        None if dh is None else backend.put(dh),
        dx,
        dweight,
        dbias,
        backend.empty((2, parts, cols), torch.float32),
    )
    backend.finish()
    return (
        backend.get(dx),
        backend.get(dweight),
        backend.get(dbias) if with_bias else None,
    )


def check_fwd(got: Fwd, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    h = got.h.double()
    mean = h.mean(-1)
    assert_within(got.mean, mean, h.abs().mean(-1) * ARITHMETIC)
    variance = h.var(-1, unbiased=False)
    rstd = (variance + EPS).rsqrt()
    # The mean's error enters the variance squared, and each deviation as it is.
    slack = (h.abs().mean(-1) * ARITHMETIC).square() / (variance + EPS)
    assert_within(got.rstd, rstd, rstd * (ARITHMETIC + slack))
    n = (h - mean[:, None]) * rstd[:, None]
    shift = torch.zeros_like(weight).double() if bias is None else bias.double()
    y = n * weight.double() + shift
    terms = ((h.abs() + h.abs().mean(-1, keepdim=True)) * rstd[:, None]) * weight.double().abs()
    assert_within(got.y, y, rounded(y, got.y.dtype, terms + shift.abs()))


def check_bwd(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    dh: torch.Tensor | None,
) -> None:
    dx, dweight, dbias = gradients
    h64, w64 = h.double().requires_grad_(), weight.double().requires_grad_()
    b64 = torch.zeros_like(w64).requires_grad_()
    y = torch.nn.functional.layer_norm(h64, (h.shape[1],), w64, b64, EPS)
    y.backward(dy.double())
    assert h64.grad is not None
    assert w64.grad is not None
    assert b64.grad is not None
    expected = h64.grad + (0 if dh is None else dh.double())
    with torch.no_grad():
        rstd = (h64.var(-1, unbiased=False) + EPS).rsqrt()[:, None]
        # Each sum's error is relative to its terms.
        n = (h64.abs() + h64.abs().mean(-1, keepdim=True)) * rstd
        g = (dy.double() * w64).abs()
        terms = rstd * (g + g.mean(-1, keepdim=True) + n * (g * n).mean(-1, keepdim=True))
        terms = terms + (0 if dh is None else dh.double().abs())
        assert_within(dx, expected, rounded(expected, h.dtype, terms))
        terms = (dy.double().abs() * n).sum(0)
        assert_within(dweight, w64.grad, rounded(w64.grad, h.dtype, terms))
        if dbias is not None:
            terms = dy.double().abs().sum(0)
            assert_within(dbias, b64.grad, rounded(b64.grad, h.dtype, terms))


@pytest.mark.parametrize("whole", [False, True], ids=["plain", "residual-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend: Any, shape: tuple[int, int], dtype: torch.dtype, whole: bool) -> None:
    weight, bias, x, residual, dy, dh = tensors(*shape, dtype, 4)
    got = fwd(backend, x, residual if whole else None, weight, bias if whole else None)
    if whole:
        assert torch.equal(got.h, (x.float() + residual.float()).to(dtype))
    check_fwd(got, weight, bias if whole else None)
    extra = dh if whole else None
    check_bwd(bwd(backend, dy, got, weight, extra, with_bias=whole), dy, got.h, weight, extra)


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    shape = (case.rows, case.cols)
    x, residual = (case.tensor(*shape, index=i) for i in (0, 1))
    weight, bias = (case.normal(case.cols, index=i) for i in (2, 3))
    dy, dh = (case.normal(*shape, index=i) for i in (4, 5))
    got = fwd(CPU, x, residual if case.flag else None, weight, bias if case.flag else None)
    check_fwd(got, weight, bias if case.flag else None)
    extra = dh if case.flag else None
    check_bwd(bwd(CPU, dy, got, weight, extra), dy, got.h, weight, extra)

    x[case.pick(case.rows), case.pick(case.cols)] = float("nan")
    check_fwd(fwd(CPU, x, None, weight, bias), weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean(backend: Any, dtype: torch.dtype) -> None:
    """A variance that E[x^2] - E[x]^2 in float32 would lose."""
    weight, bias, x = tensors(4, 640, torch.float32, 1)
    x = (x + 1e4).to(dtype)
    got = fwd(backend, x, None, weight.to(dtype), bias.to(dtype))
    variance = x.double().var(-1, unbiased=False)
    torch.testing.assert_close(got.rstd.double(), (variance + EPS).rsqrt(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(backend: Any, dtype: torch.dtype) -> None:
    weight, bias, x, dy = tensors(3, 512, dtype, 2)
    got = fwd(backend, x, None, weight, bias, offset=1)
    check_fwd(got, weight, bias)
    check_bwd(bwd(backend, dy, got, weight, None, offset=1), dy, x, weight, None)


def test_no_rows(backend: Any) -> None:
    weight, bias, x, dy = tensors(0, 16, torch.bfloat16, 2)
    got = fwd(backend, x, None, weight, bias)
    dx, dweight, dbias = bwd(backend, dy, got, weight, None)
    assert dx.shape == (0, 16)
    assert dbias is not None
    assert not dweight.any()
    assert not dbias.any()


def test_nan_stays_in_its_row(backend: Any) -> None:
    weight, bias, x, dy = tensors(5, 48, torch.bfloat16, 2)
    x[2, 7] = float("nan")
    got = fwd(backend, x, None, weight, bias)
    dx, _, dbias = bwd(backend, dy, got, weight, None)
    for result in (got.y, dx):
        assert result[2].isnan().all()
        assert not result[[0, 1, 3, 4]].isnan().any()
    assert dbias is not None
    assert not dbias.isnan().any()


def test_same_bits_for_any_schedule(emulated: Any) -> None:
    weight, bias, x, dy, dh = tensors(11, 600, torch.float32, 3)
    results: list[tuple[torch.Tensor | None, ...]] = []
    for seed in range(4):
        emulated.core.set_options(schedule=seed)
        got = fwd(emulated, x, None, weight, bias)
        results.append((*got, *bwd(emulated, dy, got, weight, dh)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 512), (5, 4096)], ids=str)
def test_bytes_moved(counted: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, cols = shape
    weight, bias, x, dy = tensors(rows, cols, dtype, 2)
    row_bytes = cols * x.element_size()
    got = fwd(counted, x, None, weight, bias)
    c = counted.core.counters()
    assert c["read_bytes"] == 3 * rows * row_bytes  # x once; weight and bias per row, from a cache
    assert c["unique_read_bytes"] == rows * row_bytes + 2 * row_bytes
    assert c["written_bytes"] == c["unique_written_bytes"] == rows * row_bytes + 8 * rows
    assert c["sectors"] == c["min_sectors"]
    assert c["wavefronts"] == c["min_wavefronts"]

    counted.core.clear_counters()
    bwd(counted, dy, got, weight, None)
    c = counted.core.counters()
    partial = 8 * counted.core.layernorm_bwd_parts(rows, cols, True) * cols
    assert c["unique_read_bytes"] == 2 * rows * row_bytes + row_bytes + 8 * rows + partial
    assert c["written_bytes"] == rows * row_bytes + partial + 2 * row_bytes
    assert c["sectors"] <= 1.05 * c["min_sectors"]
    assert c["wavefronts"] == c["min_wavefronts"]


def test_binding_refuses() -> None:
    weight, bias, x = tensors(3, 8, torch.float32, 1)
    y, mean, rstd = torch.empty_like(x), torch.empty(3), torch.empty(3)

    def call(**changes: Any) -> None:
        arguments: dict[str, Any] = {
            "x": x, "residual": None, "weight": weight, "bias": bias, "y": y,
            "residual_out": None, "mean": mean, "rstd": rstd, "eps": EPS,
        }  # fmt: skip
        _core.layernorm_fwd(**(arguments | changes))

    call()
    for changes, message in (
        ({"bias": bias[:5]}, r"bias has shape \(5,\), expected \(8,\)"),
        ({"mean": mean[:2]}, r"mean has shape \(2,\), expected 3 elements"),
        ({"y": x}, "y overlaps x"),
        ({"rstd": mean}, "rstd overlaps mean"),
        ({"residual": y}, "x needs both residual and residual_out, or neither"),
        ({"x": torch.empty(3, 0)}, "x has no columns"),
    ):
        with pytest.raises(ValueError, match=f"layernorm_fwd: {message}"):
            call(**changes)
    with pytest.raises(ValueError, match="layernorm_bwd_parts: expected rows >= 0"):
        _core.layernorm_bwd_parts(-1, 8)


# --- the torch operator ------------------------------------------------------------------------


def sample() -> list[torch.Tensor]:
    weight, bias, x, residual = tensors(12, 40, torch.float32, 2)
    leaves = [x.view(3, 4, 40), residual.view(3, 4, 40), weight, bias]
    return [t.detach().requires_grad_() for t in leaves]


def test_opcheck() -> None:
    x, residual, weight, bias = sample()
    ops = torch.ops.fastllm
    for b in (bias, None):
        torch.library.opcheck(ops.layernorm_fwd.default, (x, weight, b, EPS))
        torch.library.opcheck(ops.layernorm_residual_fwd.default, (x, residual, weight, b, EPS))
    _, mean, rstd = ops.layernorm_fwd(x.detach(), weight.detach(), None, EPS)
    for dh, with_bias in ((None, True), (torch.randn_like(x), False)):
        arguments = (residual.detach(), x.detach(), weight.detach(), mean, rstd, dh, with_bias)
        torch.library.opcheck(ops.layernorm_bwd.default, arguments)


def loss_of(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    y, h = layernorm_residual(x, residual, weight, bias, EPS)
    return (y.sin() + h.cos() + layernorm(h * 2, weight, None, EPS)).sum()


def reference_loss(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    norm = torch.nn.functional.layer_norm
    h = x + residual
    return (norm(h, (40,), weight, bias, EPS).sin() + h.cos() + norm(h * 2, (40,), weight)).sum()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_gradients_through_autograd(compiler: str | None) -> None:
    inputs = sample()
    function: Callable[..., torch.Tensor] = loss_of
    if compiler is not None:
        function = torch.compile(loss_of, fullgraph=True, backend=compiler)
    gradients = torch.autograd.grad(function(*inputs), inputs)
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(reference_loss(*inputs64), inputs64)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16, device="cuda")
        w = torch.empty(8, dtype=torch.bfloat16, device="cuda")
        y, h = layernorm_residual(x, x, w, w)
    assert (y.shape, y.dtype, y.device) == (h.shape, h.dtype, h.device)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "cuda")
