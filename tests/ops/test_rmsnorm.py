"""RMSNorm on every backend against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastllm_core import _core
from fastllm_train.ops.rmsnorm import rmsnorm, rmsnorm_residual

from .accuracy import ARITHMETIC, DTYPES, assert_within, randoms, rounded
from .random_inputs import CPU, RandomCase, random_cases

EPS = 1e-6
SHAPES = (
    (5, 512),
    (3, 1000),
    (2, 4096),
    (1, 1),
    (9, 33),
    (4, 1024),
    (70, 24),
    (2, 4097),
    (1, 20000),
)


@dataclass
class Fwd:
    y: torch.Tensor
    h: torch.Tensor
    rstd: torch.Tensor


def tensors(rows: int, cols: int, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
    """A weight (cols,) and ``count`` tensors (rows, cols)."""
    return randoms((cols,), *[(rows, cols)] * count, dtype=dtype)


def fwd(
    backend: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    offset: int = 0,
) -> Fwd:
    y = backend.empty(tuple(x.shape), x.dtype, offset)
    h = None if residual is None else backend.empty(tuple(x.shape), x.dtype)
    rstd = backend.empty((x.shape[0],), torch.float32)
    backend.core.rmsnorm_fwd(
        backend.put(x, offset),
        None if residual is None else backend.put(residual),
        backend.put(weight),
        y,
        h,
        rstd,
        EPS,
    )
    backend.finish()
    return Fwd(backend.get(y), x if h is None else backend.get(h), backend.get(rstd))


def bwd(
    backend: Any,
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, cols = h.shape
    parts = backend.core.rmsnorm_bwd_parts(rows, cols, backend.cuda)
    dx = backend.empty((rows, cols), h.dtype)
    dweight = backend.empty((cols,), h.dtype)
    backend.core.rmsnorm_bwd(
        backend.put(dy, offset),
        backend.put(h),
        backend.put(weight),
        backend.put(rstd),
        None if dh is None else backend.put(dh),
        dx,
        dweight,
        backend.empty((parts, cols), torch.float32),
    )
    backend.finish()
    return backend.get(dx), backend.get(dweight)


def reference_fwd(h: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h64 = h.double()
    rstd = (h64.square().mean(-1) + EPS).rsqrt()
    return h64 * rstd[:, None] * weight.double(), rstd


def check_fwd(got: Fwd, weight: torch.Tensor) -> None:
    y, rstd = reference_fwd(got.h, weight)
    dtype = got.y.dtype
    assert got.y.dtype == weight.dtype
    assert_within(got.y, y, rounded(y, dtype, y.abs()))
    assert_within(got.rstd, rstd, rstd * ARITHMETIC)


def check_bwd(
    dx: torch.Tensor,
    dweight: torch.Tensor,
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    dh: torch.Tensor | None,
) -> None:
    dtype = h.dtype
    h64 = h.double().requires_grad_()
    w64 = weight.double().requires_grad_()
    y = h64 * (h64.square().mean(-1, keepdim=True) + EPS).rsqrt() * w64
    y.backward(dy.double())
    assert h64.grad is not None
    assert w64.grad is not None
    expected = h64.grad + (0 if dh is None else dh.double())
    # dx is a difference: float32's error is relative to its terms, not to the result.
    _, rstd = reference_fwd(h, weight)
    g = (dy.double() * weight.double()).abs()
    normalised = (h.double() * rstd[:, None]).abs()
    terms = rstd[:, None] * (g + normalised * (g * normalised).mean(-1, keepdim=True))
    if dh is not None:
        terms = terms + dh.double().abs()
    assert_within(dx, expected, rounded(expected, dtype, terms))
    summed = (dy.double() * h.double() * rstd[:, None]).abs().sum(0)
    assert_within(dweight, w64.grad, rounded(w64.grad, dtype, summed))


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(
    backend: Any, shape: tuple[int, int], dtype: torch.dtype, with_residual: bool
) -> None:
    weight, x, residual, dy, dh = tensors(*shape, dtype, 4)
    got = fwd(backend, x, residual if with_residual else None, weight)
    if with_residual:
        assert torch.equal(got.h, (x.float() + residual.float()).to(dtype))
    check_fwd(got, weight)
    extra = dh if with_residual else None
    dx, dweight = bwd(backend, dy, got.h, weight, got.rstd, extra)
    check_bwd(dx, dweight, dy, got.h, weight, extra)


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    shape = (case.rows, case.cols)
    x, residual = (case.tensor(*shape, index=i) for i in (0, 1))
    weight, dy, dh = (case.normal(*s, index=2 + i) for i, s in enumerate((shape[1:], shape, shape)))
    got = fwd(CPU, x, residual if case.flag else None, weight)
    check_fwd(got, weight)
    extra = dh if case.flag else None
    dx, dweight = bwd(CPU, dy, got.h, weight, got.rstd, extra)
    check_bwd(dx, dweight, dy, got.h, weight, extra)

    x[case.pick(case.rows), case.pick(case.cols)] = float("nan")
    check_fwd(fwd(CPU, x, None, weight), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(backend: Any, dtype: torch.dtype) -> None:
    """Columns would allow 16-byte accesses, an odd offset does not."""
    weight, x, dy = tensors(3, 512, dtype, 2)
    got = fwd(backend, x, None, weight, offset=1)
    check_fwd(got, weight)
    dx, dweight = bwd(backend, dy, x, weight, got.rstd, None, offset=1)
    check_bwd(dx, dweight, dy, x, weight, None)


def test_no_rows(backend: Any) -> None:
    weight, x, dy = tensors(0, 16, torch.bfloat16, 2)
    got = fwd(backend, x, None, weight)
    assert got.y.shape == (0, 16)
    dx, dweight = bwd(backend, dy, x, weight, got.rstd, None)
    assert dx.shape == (0, 16)
    assert torch.equal(dweight, torch.zeros(16, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_row(backend: Any, dtype: torch.dtype) -> None:
    weight, x = tensors(2, 40, dtype, 1)
    x[1] = 0
    got = fwd(backend, x, None, weight)
    check_fwd(got, weight)
    assert torch.equal(got.y[1], torch.zeros(40, dtype=dtype))
    assert got.rstd[1].item() == pytest.approx(EPS**-0.5, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_stay_in_their_row(backend: Any, bad: float) -> None:
    weight, x, dy = tensors(5, 48, torch.bfloat16, 2)
    x[2, 7] = bad
    got = fwd(backend, x, None, weight)
    check_fwd(got, weight)
    assert got.y[2, 7].isnan()
    assert not got.y[[0, 1, 3, 4]].isnan().any()
    dx, dweight = bwd(backend, dy, x, weight, got.rstd, None)
    assert not dx[[0, 1, 3, 4]].isnan().any()
    assert dx[2].isnan().all()
    assert dweight[7].isnan()


def test_same_bits_for_any_schedule(emulated: Any) -> None:
    weight, x, dy, dh = tensors(11, 600, torch.float32, 3)
    results = []
    for seed in (0, 1, 2, 3):
        emulated.core.set_options(schedule=seed)
        got = fwd(emulated, x, None, weight)
        results.append((got.y, got.rstd, *bwd(emulated, dy, x, weight, got.rstd, dh)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 512), (5, 4096), (9, 128)], ids=str)
def test_bytes_moved(counted: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Each row is read once and written once, and no sector is touched that is not needed."""
    rows, cols = shape
    weight, x, dy = tensors(rows, cols, dtype, 2)
    row_bytes = cols * x.element_size()
    got = fwd(counted, x, None, weight)
    c = counted.core.counters()
    assert c["read_bytes"] == rows * row_bytes + rows * row_bytes  # x once, the weight per row
    assert c["unique_read_bytes"] == rows * row_bytes + row_bytes
    assert c["written_bytes"] == c["unique_written_bytes"] == rows * row_bytes + 4 * rows
    assert c["sectors"] == c["min_sectors"]
    assert c["wavefronts"] == c["min_wavefronts"]

    counted.core.clear_counters()
    bwd(counted, dy, x, weight, got.rstd, None)
    c = counted.core.counters()
    parts = counted.core.rmsnorm_bwd_parts(rows, cols, True)
    assert c["unique_read_bytes"] == 2 * rows * row_bytes + row_bytes + 4 * rows + 4 * parts * cols
    assert c["written_bytes"] == rows * row_bytes + 4 * parts * cols + row_bytes
    assert c["sectors"] <= 1.05 * c["min_sectors"]
    assert c["wavefronts"] == c["min_wavefronts"]


def test_binding_refuses() -> None:
    weight, x, residual = tensors(3, 8, torch.float32, 2)
    y = torch.empty_like(x)
    rstd = torch.empty(3)

    def call(**changes: Any) -> None:
        arguments: dict[str, Any] = {
            "x": x, "residual": None, "weight": weight, "y": y, "residual_out": None,
            "rstd": rstd, "eps": EPS,
        }  # fmt: skip
        _core.rmsnorm_fwd(**(arguments | changes))

    call()
    for changes, message in (
        ({"x": x.double()}, "x has DLPack type code 2 with 64 bits"),
        ({"x": x.bfloat16()}, "weight is float32, expected bfloat16"),
        ({"weight": weight[:5]}, r"weight has shape \(5,\), expected \(8,\)"),
        ({"y": y[:2]}, r"y has shape \(2,8\), expected \(3,8\)"),
        ({"rstd": rstd.half()}, "rstd is float16, expected float32"),
        ({"x": torch.empty(8, 3).t()}, "x is not contiguous"),
        ({"y": x}, "y overlaps x"),
        ({"residual": residual}, "x needs both residual and residual_out, or neither"),
        ({"residual": residual, "residual_out": y}, "y overlaps residual_out"),
        ({"x": torch.empty(3, 0)}, "x has no columns"),
    ):
        with pytest.raises(ValueError, match=f"rmsnorm_fwd: {message}"):
            call(**changes)
    with pytest.raises(TypeError, match="rmsnorm_fwd: x is a list"):
        call(x=[1.0])
    capsule = x.__dlpack__()
    call(x=capsule)
    with pytest.raises(TypeError, match="x is not an unused DLPack capsule"):
        call(x=capsule)


def test_residual_in_place(backend: Any) -> None:
    weight, x, residual = tensors(4, 96, torch.bfloat16, 2)
    arrays = [backend.put(t) for t in (x, residual, weight)]
    y = backend.empty((4, 96), torch.bfloat16)
    rstd = backend.empty((4,), torch.float32)
    backend.core.rmsnorm_fwd(*arrays[:3], y, arrays[1], rstd, EPS)
    backend.finish()
    expected = fwd(backend, x, residual, weight)
    assert torch.equal(backend.get(arrays[1]), expected.h)
    assert torch.equal(backend.get(y), expected.y)


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match='unknown instruction set "sse"'):
        _core.set_cpu_isa("sse")


# --- the torch operator ------------------------------------------------------------------------


def sample(grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, x, residual = tensors(12, 40, torch.float32, 2)
    x, residual = x.view(3, 4, 40), residual.view(3, 4, 40)
    return x.requires_grad_(grad), residual.requires_grad_(grad), weight.requires_grad_(grad)


def test_opcheck() -> None:
    x, residual, weight = sample(grad=True)
    ops = torch.ops.fastllm
    torch.library.opcheck(ops.rmsnorm_fwd.default, (x, weight, EPS))
    torch.library.opcheck(ops.rmsnorm_residual_fwd.default, (x, residual, weight, EPS))
    _, rstd = ops.rmsnorm_fwd(x.detach(), weight.detach(), EPS)
    for dh in (None, torch.randn_like(x)):
        arguments = (residual.detach(), x.detach(), weight.detach(), rstd, dh)
        torch.library.opcheck(ops.rmsnorm_bwd.default, arguments)


def loss_of(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y, h = rmsnorm_residual(x, residual, weight)
    return (y.sin() + h.cos() + rmsnorm(h * 2, weight)).sum()


def reference_loss(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    def norm(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(t, (t.shape[-1],), weight, EPS)

    h = x + residual
    return (norm(h).sin() + h.cos() + norm(h * 2)).sum()


# torch's own, while it compiles.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize(
    "compiler", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_gradients_through_autograd(compiler: str | None) -> None:
    inputs = sample(grad=True)
    function: Callable[..., torch.Tensor] = loss_of
    if compiler is not None:
        function = torch.compile(loss_of, fullgraph=True, backend=compiler)
    gradients = torch.autograd.grad(function(*inputs), inputs)
    inputs64 = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(reference_loss(*inputs64), inputs64)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_sum_alone() -> None:
    x, residual, weight = sample(grad=True)
    _, h = rmsnorm_residual(x, residual, weight)
    h.square().sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, 2 * (x + residual).detach())
    torch.testing.assert_close(residual.grad, 2 * (x + residual).detach())


def test_not_contiguous() -> None:
    x, _, weight = sample(grad=False)
    turned = x.transpose(0, 1)
    assert torch.equal(rmsnorm(turned, weight), rmsnorm(turned.contiguous(), weight))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16, device="cuda")
        y, h = rmsnorm_residual(x, x, torch.empty(8, dtype=torch.bfloat16, device="cuda"))
    assert (y.shape, y.dtype, y.device) == (h.shape, h.dtype, h.device)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, torch.bfloat16, "cuda")


def test_mismatched_dtype_is_a_value_error() -> None:
    x, _, weight = sample(grad=False)
    with pytest.raises(ValueError, match="weight is float32, expected bfloat16"):
        rmsnorm(x.bfloat16(), weight)
