"""LayerNorm, with an optional residual addition fused in front.

    h = x, or round(x + residual);  y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias

over the last dimension, computed in float32 between load and store (Ba, Kiros and Hinton,
arXiv:1607.06450; formula and gradients in ``cpp/include/fastllm/layernorm.hpp``). The gradients of
weight and bias are sums in a fixed order: the same inputs give the same bits, on the CPU for any
number of threads.
"""

from __future__ import annotations

from typing import Any

import torch

from fastllm_core import _core
from fastllm_train.ops.registration import (
    capsule,
    contiguous_capsule,
    define,
    define_differentiable,
    optional_capsule,
    stream_of,
)

__all__ = ["layernorm", "layernorm_residual"]


def layernorm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalises ``x`` over its last dimension.

    Args:
        x: shape ``(..., cols)``, float32, bfloat16 or float16, on the CPU or a CUDA device.
        weight: shape ``(cols,)``, the dtype and device of ``x``.
        bias: likewise; None for zero.
        eps: added to the variance.

    Returns:
        y, the shape and dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _layernorm_fwd(x, weight, bias, eps)[0]


def layernorm_residual(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds ``residual`` to ``x`` and normalises the sum.

    Args:
        x: as for :func:`layernorm`.
        residual: the shape, dtype and device of ``x``.
        weight: as for :func:`layernorm`.
        bias: as for :func:`layernorm`.
        eps: as for :func:`layernorm`.

    Returns:
        y, and h = x + residual, rounded to the dtype: the residual of the next addition. Both have
        the shape and dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    y, h, _, _ = _layernorm_residual_fwd(x, residual, weight, bias, eps)
    return y, h


def _fwd(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None else torch.empty_like(y)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _core.layernorm_fwd(
        contiguous_capsule(x),
        optional_capsule(residual),
        contiguous_capsule(weight),
        optional_capsule(bias),
        capsule(y),
        None if h is None else capsule(h),
        capsule(mean),
        capsule(rstd),
        eps,
        stream_of(x),
    )
    return y, h, mean, rstd


def _fwd_kernel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, _, mean, rstd = _fwd(x, None, weight, bias, eps)
    return y, mean, rstd


def _fwd_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def per_row() -> torch.Tensor:
        return x.new_empty(x.shape[:-1], dtype=torch.float32)

    return x.new_empty(x.shape), per_row(), per_row()


def _residual_fwd_kernel(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, h, mean, rstd = _fwd(x, residual, weight, bias, eps)
    assert h is not None
    return y, h, mean, rstd


def _residual_fwd_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, mean, rstd = _fwd_fake(x, weight, bias, eps)
    return y, x.new_empty(x.shape), mean, rstd


def _bwd_kernel(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight, dbias = _bwd_fake(dy, h, weight, mean, rstd, dh, with_bias)
    cols = weight.shape[0]
    parts = _core.layernorm_bwd_parts(rstd.numel(), cols, h.is_cuda, h.device.index or 0)
    partial = torch.empty((2, parts, cols), dtype=torch.float32, device=h.device)
    _core.layernorm_bwd(
        contiguous_capsule(dy),
        contiguous_capsule(h),
        contiguous_capsule(weight),
        contiguous_capsule(mean),
        contiguous_capsule(rstd),
        optional_capsule(dh),
        contiguous_capsule(dx),
        contiguous_capsule(dweight),
        contiguous_capsule(dbias) if with_bias else None,
        contiguous_capsule(partial),
        stream_of(h),
    )
    return dx, dweight, dbias


def _bwd_fake(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Without a bias its gradient has no elements.
    dbias = weight.new_empty(weight.shape if with_bias else (0,))
    return h.new_empty(h.shape), weight.new_empty(weight.shape), dbias


_layernorm_bwd = define(
    "layernorm_bwd(Tensor dy, Tensor h, Tensor weight, Tensor mean, Tensor rstd, Tensor? dh,"
    " bool with_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _bwd_kernel,
    _bwd_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.with_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _dmean: None, _drstd: None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _layernorm_bwd(dy, x, weight, mean, rstd, None, ctx.with_bias)
    return dx, dweight, dbias if ctx.with_bias else None, None


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, weight, bias, _ = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(h, weight, mean, rstd)
    ctx.with_bias = bias is not None
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _residual_backward(
    ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None, _dmean: None, _drstd: None
) -> tuple[Any, ...]:
    if dy is None:  # only h was used, which is a plain sum
        return dh, dh, None, None, None
    h, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _layernorm_bwd(dy, h, weight, mean, rstd, dh, ctx.with_bias)
    return dx, dx, dweight, dbias if ctx.with_bias else None, None


_layernorm_fwd = define_differentiable(
    "layernorm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
_layernorm_residual_fwd = define_differentiable(
    "layernorm_residual_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    _residual_fwd_kernel,
    _residual_fwd_fake,
    _residual_setup,
    _residual_backward,
)
