"""RMSNorm, with an optional residual addition fused in front.

    h = x, or round(x + residual);  y = round(h / sqrt(mean(h^2) + eps) * weight)

over the last dimension, computed in float32 between load and store (Zhang and Sennrich,
arXiv:1910.07467; formula and gradients in ``cpp/include/fastllm/rmsnorm.hpp``). The gradient of the
weight is a sum in a fixed order: the same inputs give the same bits, on the CPU for any number of
threads.
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
    stream_of,
)

__all__ = ["rmsnorm", "rmsnorm_residual"]


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Normalises ``x`` over its last dimension.

    Args:
        x: shape ``(..., cols)``, float32, bfloat16 or float16, on the CPU or a CUDA device.
        weight: shape ``(cols,)``, the dtype and device of ``x``.
        eps: added to the mean of squares.

    Returns:
        y, the shape and dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _rmsnorm_fwd(x, weight, eps)[0]


def rmsnorm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds ``residual`` to ``x`` and normalises the sum.

    Args:
        x: as for :func:`rmsnorm`.
        residual: the shape, dtype and device of ``x``.
        weight: as for :func:`rmsnorm`.
        eps: as for :func:`rmsnorm`.

    Returns:
        y, and h = x + residual, rounded to the dtype: the residual of the next addition. Both have
        the shape and dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    y, h, _ = _rmsnorm_residual_fwd(x, residual, weight, eps)
    return y, h


def _fwd(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None else torch.empty_like(y)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    _core.rmsnorm_fwd(
        contiguous_capsule(x),
        None if residual is None else contiguous_capsule(residual),
        contiguous_capsule(weight),
        capsule(y),
        None if h is None else capsule(h),
        capsule(rstd),
        eps,
        stream_of(x),
    )
    return y, h, rstd


def _fwd_kernel(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = _fwd(x, None, weight, eps)
    return y, rstd


def _fwd_fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _residual_fwd_kernel(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, h, rstd = _fwd(x, residual, weight, eps)
    assert h is not None
    return y, h, rstd


def _residual_fwd_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, rstd = _fwd_fake(x, weight, eps)
    return y, x.new_empty(x.shape), rstd


def _bwd_kernel(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    cols = weight.shape[0]
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    parts = _core.rmsnorm_bwd_parts(rstd.numel(), cols, h.is_cuda, h.device.index or 0)
    partial = h.new_empty((parts, cols), dtype=torch.float32)
    _core.rmsnorm_bwd(
        contiguous_capsule(dy),
        contiguous_capsule(h),
        contiguous_capsule(weight),
        contiguous_capsule(rstd),
        None if dh is None else contiguous_capsule(dh),
        contiguous_capsule(dx),
        contiguous_capsule(dweight),
        contiguous_capsule(partial),
        stream_of(h),
    )
    return dx, dweight


def _bwd_fake(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    dh: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


_rmsnorm_bwd = define(
    "rmsnorm_bwd(Tensor dy, Tensor h, Tensor weight, Tensor rstd, Tensor? dh)"
    " -> (Tensor dx, Tensor dweight)",
    _bwd_kernel,
    _bwd_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.save_for_backward(x, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _drstd: None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _rmsnorm_bwd(dy, x, weight, rstd, None)
    return dx, dweight, None


def _residual_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    _, h, rstd = output
    ctx.save_for_backward(h, inputs[2], rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _residual_backward(
    ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None, _drstd: None
) -> tuple[Any, ...]:
    if dy is None:  # only h was used, which is a plain sum
        return dh, dh, None, None
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = _rmsnorm_bwd(dy, h, weight, rstd, dh)
    return dx, dx, dweight, None


_rmsnorm_fwd = define_differentiable(
    "rmsnorm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
_rmsnorm_residual_fwd = define_differentiable(
    "rmsnorm_residual_fwd(Tensor x, Tensor residual, Tensor weight, float eps)"
    " -> (Tensor y, Tensor h, Tensor rstd)",
    _residual_fwd_kernel,
    _residual_fwd_fake,
    _residual_setup,
    _residual_backward,
)
