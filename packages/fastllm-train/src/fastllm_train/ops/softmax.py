"""Softmax of attention scores: scaled, causal, masked, or with ALiBi.

    y = softmax(x * scale + alibi), over the places that take part, and 0 elsewhere

over the last dimension, computed in float32 between load and store; any number of queries and keys
(formulas in ``cpp/include/fastllm/softmax.hpp``). Kept for the backward pass is y alone.
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

__all__ = ["softmax"]


def softmax(
    x: torch.Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probabilities of the keys.

    Args:
        x: scores, shape ``(batch, heads, queries, keys)``; float32, bfloat16 or float16, on the CPU
            or a CUDA device.
        scale: what the scores are multiplied by.
        causal: query i takes part at keys ``j <= i + keys - queries``.
        mask: bool, four dimensions that broadcast to those of ``x``: True where a key takes part,
            as in ``scaled_dot_product_attention``. Not copied where its keys are adjacent.
        slopes: float32, shape ``(heads,)``: ALiBi adds ``slope * (j - i - keys + queries)``, after
            the scaling. Gets no gradient.

    Returns:
        A tensor of the shape and dtype of ``x``. Rows without a key, or whose scores are all -inf,
        are 0.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _softmax_fwd(x, mask, slopes, scale, causal)


def _mask_of(x: torch.Tensor, mask: torch.Tensor | None) -> object:
    if mask is None:
        return None
    if mask.shape[-1] != x.shape[-1]:
        mask = mask.expand(*mask.shape[:-1], x.shape[-1])
    return capsule(mask if mask.stride(-1) == 1 else mask.contiguous())


def _fwd_kernel(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _core.softmax_fwd(
        contiguous_capsule(x),
        _mask_of(x, mask),
        optional_capsule(slopes),
        contiguous_capsule(y),
        scale,
        causal,
        stream_of(x),
    )
    return y


def _fwd_fake(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _bwd_kernel(dy: torch.Tensor, y: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    dx = torch.empty_like(y, memory_format=torch.contiguous_format)
    _core.softmax_bwd(
        contiguous_capsule(dy),
        contiguous_capsule(y),
        contiguous_capsule(dx),
        scale,
        causal,
        stream_of(y),
    )
    return dx


def _bwd_fake(dy: torch.Tensor, y: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    return y.new_empty(y.shape)


_softmax_bwd = define(
    "softmax_bwd(Tensor dy, Tensor y, float scale, bool causal) -> Tensor", _bwd_kernel, _bwd_fake
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, _, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(output)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    (y,) = ctx.saved_tensors
    return _softmax_bwd(dy, y, ctx.scale, ctx.causal), None, None, None, None


_softmax_fwd = define_differentiable(
    "softmax_fwd(Tensor x, Tensor? mask, Tensor? slopes, float scale, bool causal) -> Tensor",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
