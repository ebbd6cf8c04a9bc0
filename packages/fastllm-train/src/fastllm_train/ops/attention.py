"""Causal attention on a CPU, without the matrix of scores in memory.

    out = softmax(scale * q kᵀ, over the keys up to the query) v

for every head (formulas and gradients in ``cpp/include/fastllm/attention.hpp``). Kept for the
backward pass are the arguments, ``out`` and the logarithm of each query's sum. The kernel is one of
float32; other dtypes are widened for it, and its results rounded once.
"""

from __future__ import annotations

from typing import Any

import torch

from fastllm_core import _core
from fastllm_train.ops.registration import capsule, define, define_differentiable

__all__ = ["causal_attention", "takes_attention"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None
) -> torch.Tensor:
    """Attention of every query to the keys of its sequence up to itself.

    Args:
        q: shape ``(batch, length, heads, dim)``; float32, bfloat16 or float16, on the CPU; dim a
            multiple of 16 up to 256. A view, such as a part of a wider tensor, is not copied as
            long as channels are adjacent.
        k: shape ``(batch, length, kv_heads, dim)``, of q's dtype and device; ``kv_heads`` divides
            ``heads``, and so many query heads in a row share one.
        v: as ``k``.
        scale: of the scores; by default 1 / sqrt(dim).

    Returns:
        The shape of ``q``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _attention_fwd(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)[0]


def takes_attention(q: torch.Tensor) -> bool:
    """Whether ``causal_attention`` has a kernel for such queries."""
    dim = q.shape[-1]
    return q.is_cpu and q.dtype in _DTYPES and 0 < dim <= 256 and dim % 16 == 0


def _operand(x: torch.Tensor) -> object:
    if x.dtype in _DTYPES:
        x = x.float()
    return capsule(x if x.stride(-1) == 1 else x.contiguous())


def _fwd_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = q.new_empty(q.shape, dtype=torch.float32)
    lse = wide.new_empty((q.shape[0], q.shape[2], q.shape[1]))
    _core.attention_fwd(_operand(q), _operand(k), _operand(v), capsule(wide), capsule(lse), scale)
    return wide.to(q.dtype), lse


def _fwd_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, _ = q.shape
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _bwd_kernel(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    _core.attention_bwd(
        _operand(dout),
        _operand(q),
        _operand(k),
        _operand(v),
        _operand(out),
        capsule(lse),
        capsule(dq),
        capsule(dk),
        capsule(dv),
        scale,
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _bwd_fake(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_attention_bwd = define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    _bwd_kernel,
    _bwd_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, _dlse: None) -> tuple[Any, ...]:
    if dout is None:
        return None, None, None, None
    return *_attention_bwd(dout, *ctx.saved_tensors, ctx.scale), None


_attention_fwd = define_differentiable(
    "attention_fwd(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
