"""The products as torch operators: values, gradients, opcheck, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, silu

from fastllm_train.ops.grouped_linear import grouped_linear
from fastllm_train.ops.linear_bias import linear_bias
from fastllm_train.ops.linear_bias_gelu import linear_bias_gelu
from fastllm_train.ops.linear_swiglu import linear_swiglu
from fastllm_train.ops.linear_weight_grad import linear_weight_grad_

from .accuracy import DTYPES

OFFSETS = torch.tensor([0, 3, 3, 10])


def randoms(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).mul(0.5).to(dtype) for s in shapes]


def grouped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    at = OFFSETS.tolist()
    return torch.cat([x[at[g] : at[g + 1]] @ w[g].t() for g in range(len(w))])


# The operator, the same in plain torch, shapes of the arguments.
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "linear_bias": (linear_bias, lambda x, w, b: x @ w.t() + b, ((2, 5, 16), (24, 16), (24,))),
    "linear": (linear_bias, lambda x, w: x @ w.t(), ((5, 9), (7, 9))),
    "linear_bias_gelu": (
        linear_bias_gelu,
        lambda x, w, b: gelu(x @ w.t() + b, approximate="tanh"),
        ((2, 5, 16), (24, 16), (24,)),
    ),
    "linear_swiglu": (
        linear_swiglu,
        lambda x, g, u: silu(x @ g.t()) * (x @ u.t()),
        ((2, 5, 16), (24, 16), (24, 16)),
    ),
    "grouped_linear": (
        lambda x, w: grouped_linear(x, w, OFFSETS.to(x.device)),
        grouped,
        ((10, 16), (3, 24, 16)),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_values_and_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    operator, plain, shapes = OPERATORS[name]
    leaves = [t.to(device).requires_grad_() for t in randoms(*shapes, dtype=dtype)]
    doubles = [t.detach().cpu().double().requires_grad_() for t in leaves]
    y, want = operator(*leaves), plain(*doubles)
    assert y.dtype == dtype
    got = torch.autograd.grad(y.sum(), leaves)
    expected = torch.autograd.grad(want.sum(), doubles)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for a, b in zip((y, *got), (want, *expected), strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_whole(name: str) -> None:
    operator, plain, shapes = OPERATORS[name]
    leaves = [t.requires_grad_() for t in randoms(*shapes)]
    compiled: Any = torch.compile(operator, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves).sin().sum(), leaves)
    want = torch.autograd.grad(plain(*leaves).sin().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    x, w, b, g = (t.requires_grad_() for t in randoms((5, 16), (24, 16), (24,), (3, 24, 16)))
    fastllm: Any = torch.ops.fastllm
    torch.library.opcheck(fastllm.linear_bias_fwd.default, (x, w, b))
    torch.library.opcheck(fastllm.linear_bias_fwd.default, (x, w, None))
    torch.library.opcheck(fastllm.linear_bias_gelu_fwd.default, (x, w, b))
    torch.library.opcheck(fastllm.linear_swiglu_fwd.default, (x, w, w.detach().clone()))
    offsets = torch.tensor([0, 2, 2, 5])
    torch.library.opcheck(fastllm.grouped_linear_fwd.default, (x, g, offsets))
    dw, dy = randoms((24, 16), (5, 24))
    torch.library.opcheck(fastllm.linear_weight_grad.default, (dw, dy, x.detach()))
    torch.library.opcheck(fastllm.grouped_linear_weight_grad.default, (dy, x.detach(), offsets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_grad_adds_in_float32(dtype: torch.dtype) -> None:
    dy, x = randoms((2, 300, 8), (2, 300, 16), dtype=dtype)
    dw = torch.full((8, 16), 100.0)
    version = dw._version
    assert linear_weight_grad_(dw, dy, x) is dw
    want = 100 + dy.view(-1, 8).double().t() @ x.view(-1, 16).double()
    torch.testing.assert_close(dw.double(), want, rtol=2e-6, atol=1e-4)
    assert dw._version > version


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: linear_bias(x, w[:, :8]), r"weight \(24, 8\), expected"),
        (lambda x, w: linear_bias(x, w.half()), "weight is torch.float16"),
        (lambda x, w: linear_bias(x, w, x[0, :3]), r"bias has shape \(3,\)"),
        (lambda x, w: linear_swiglu(x, w, w[:8]), r"wu has shape \(8, 16\)"),
        (lambda x, w: grouped_linear(x, w[None], OFFSETS), r"offsets has shape \(4,\)"),
        (lambda x, w: linear_weight_grad_(w.half(), x, x), "linear_weight_grad: dw has shape"),
    ],
)
def test_refuses(call: Callable[..., Any], message: str) -> None:
    x, w = randoms((5, 16), (24, 16))
    with pytest.raises(ValueError, match=message):
        call(x, w)
