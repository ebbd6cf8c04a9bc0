"""Linear layer: ``x @ weight.T + bias``, in one kernel where fastllm_core has it (``ops.gemm``)."""

from __future__ import annotations

from typing import Any

import torch

from fastllm_train.ops.gemm import kernels, require_linear, takes
from fastllm_train.ops.registration import (
    contiguous_capsule,
    define_differentiable,
    optional_capsule,
    stream_of,
)

__all__ = ["linear_bias"]


def linear_bias(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight.T + bias, with float32 accumulation, rounded once.

    Args:
        x: shape ``(..., k)``; float32, bfloat16 or float16.
        weight: shape ``(n, k)``, the dtype and device of ``x``.
        bias: shape ``(n,)``, likewise, or None.

    Returns:
        Shape ``(..., n)``, the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    require_linear("linear_bias", x, "weight", weight)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"linear_bias: bias has shape {tuple(bias.shape)} of {bias.dtype},"
            f" expected {tuple(weight.shape[:1])} of {x.dtype}"
        )
    y = _linear_bias_fwd(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _fwd_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not takes(x, weight):
        return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
    y = _fwd_fake(x, weight, bias)
    kernels.linear_bias(
        contiguous_capsule(x),
        contiguous_capsule(weight),
        optional_capsule(bias),
        contiguous_capsule(y),
        stream_of(x),
    )
    return y


def _fwd_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    return (
        dy @ weight if ctx.needs_input_grad[0] else None,
        dy.t() @ x if ctx.needs_input_grad[1] else None,
        dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None,
    )


_linear_bias_fwd = define_differentiable(
    "linear_bias_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
