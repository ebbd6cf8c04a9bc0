"""GELU of a sum with a bias, in its tanh form: ``gelu(x + bias)``.

Computed in float32 and rounded once; neither the sum nor the activation's derivative is kept for
the backward pass, which gives the bias's gradient from the same pass over memory (formulas in
``cpp/include/fastllm/bias_gelu.hpp``), in a fixed order of summation.
"""

from __future__ import annotations

from typing import Any

import torch

from fastllm_core import _core
from fastllm_train.ops.registration import (
    contiguous_capsule,
    define,
    define_differentiable,
    stream_of,
)

__all__ = ["bias_gelu"]


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x + bias).

    Args:
        x: shape ``(..., cols)``; float32, bfloat16 or float16, on the CPU or a CUDA device.
        bias: shape ``(cols,)``, the dtype and device of ``x``.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _bias_gelu_fwd(x, bias)


def _fwd_kernel(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _core.bias_gelu_fwd(
        contiguous_capsule(x), contiguous_capsule(bias), contiguous_capsule(y), stream_of(x)
    )
    return y


def _fwd_fake(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _bwd_kernel(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dbias = _bwd_fake(dy, x, bias)
    cols = bias.shape[0]
    rows = x.numel() // cols
    parts = _core.bias_gelu_bwd_parts(rows, cols, x.is_cuda, x.device.index or 0)
    partial = torch.empty((parts, cols), dtype=torch.float32, device=x.device)
    _core.bias_gelu_bwd(
        contiguous_capsule(dy),
        contiguous_capsule(x),
        contiguous_capsule(bias),
        contiguous_capsule(dx),
        contiguous_capsule(dbias),
        contiguous_capsule(partial),
        stream_of(x),
    )
    return dx, dbias


def _bwd_fake(
    dy: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


_bias_gelu_bwd = define(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    _bwd_kernel,
    _bwd_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    return _bias_gelu_bwd(dy, *ctx.saved_tensors)


_bias_gelu_fwd = define_differentiable(
    "bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor", _fwd_kernel, _fwd_fake, _setup, _backward
)
