"""Products of float32 matrices on a CPU, in the core's kernel where that is faster than torch's.

Torch's wheels multiply with Intel's MKL, which takes code for AVX2 on the processors of others. On
those with AVX-512 the core's kernel (``cpp/include/fastllm/matmul.hpp``) takes half of the time;
everywhere else, and in every other dtype, these functions are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastllm_core import _core
from fastllm_train.ops.registration import capsule, direct_function, runs_directly

__all__ = ["linear", "multiply_"]

# Multiplications below which a call of the kernel costs more than it saves.
_LEAST = 1 << 20


def multiply_(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, accumulate: bool = False
) -> torch.Tensor:
    """out = a @ b, or out += a @ b. No gradients.

    Args:
        out: shape ``(m, n)``, its rows contiguous; overlaps neither ``a`` nor ``b``.
        a: shape ``(m, k)``, the dtype and device of ``out``.
        b: shape ``(k, n)``, likewise.

    Returns:
        ``out``.
    """
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if not recorded and not out.requires_grad and _takes(a, b, out):
        _core.matmul(_operand(a), _operand(b), capsule(out), accumulate)
        torch.autograd.graph.increment_version(out)
        return out
    return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear``: x (..., k), weight (n, k), bias (n,) or None → (..., n)."""
    if x.dim() < 2 or weight.dim() != 2 or not _takes(x.flatten(0, -2), weight.t(), bias):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias)


def _takes(a: torch.Tensor, b: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernel is to multiply ``a`` (m, k) by ``b`` (k, n)."""
    if not runs_directly((a, b, *others)) or not _core.matmul_pays():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    tensors = [t for t in (a, b, *others) if t is not None]
    if any(t.dtype != torch.float32 or not t.is_cpu for t in tensors):
        return False
    fits = a.dim() == 2 and a.shape[1] == b.shape[0]
    return fits and a.numel() * b.shape[1] >= _LEAST


def _operand(x: torch.Tensor) -> object:
    """Of a matrix without gradients: adjacent along one of its dimensions."""
    x = x.detach()
    return capsule(x if 1 in x.stride() else x.contiguous())


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    _core.matmul(_operand(a), _operand(b), capsule(out), False)
    return out


def _forward(
    ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None
    y = _product(x.flatten(0, -2), weight.t())
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], weight.shape[0])


@once_differentiable
def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = dy.flatten(0, -2)
    need_x, need_weight, need_bias = ctx.needs_input_grad
    return (
        _product(rows, weight).view(x.shape) if need_x else None,
        _product(rows.t(), x.flatten(0, -2)) if need_weight else None,
        rows.sum(0) if ctx.has_bias and need_bias else None,
    )


_linear = direct_function("linear", _forward, _backward)
