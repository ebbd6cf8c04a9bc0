"""A gated feed-forward layer as one operator: ``down(silu(gate(x)) * up(x))``, arXiv:2002.05202.

The gated unit is made again in the backward pass, which then needs two temporary tensors of its
size, always the same memory, where the layer's parts, one after another, take four. To the bit what
the parts give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastllm_core import _core
from fastllm_train.ops.matmul import multiply_
from fastllm_train.ops.registration import capsule, direct_function
from fastllm_train.ops.scratch import scratch

__all__ = ["gated_mlp"]


def gated_mlp(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """(silu(x gateᵀ) * (x upᵀ)) downᵀ. One backward pass. Not for torch.compile, nor under modes:
    see ``ops.registration.runs_directly``.

    Args:
        x: shape ``(..., size)``; float32, bfloat16 or float16, on the CPU.
        gate: shape ``(width, size)``, the dtype of ``x``.
        up: likewise.
        down: shape ``(size, width)``, the dtype of ``x``.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    width, size = gate.shape[0], x.shape[-1]
    for name, weight, shape in (
        ("gate", gate, (width, size)), ("up", up, (width, size)), ("down", down, (size, width)),
    ):  # fmt: skip
        if weight.shape != shape or weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(
                f"gated_mlp: {name} has shape {tuple(weight.shape)} of {weight.dtype} on"
                f" {weight.device}, expected {shape} of {x.dtype} on {x.device}"
            )
    if not x.is_cpu:
        raise ValueError(f"gated_mlp: x is on {x.device}, expected the CPU")
    return _gated_mlp(x, gate, up, down)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return multiply_(a.new_empty(a.shape[0], b.shape[1]), a, b)


def _activate(gated: torch.Tensor, upped: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    _core.glu_fwd(capsule(gated), capsule(upped), capsule(out), "silu")
    return out


def _forward(
    ctx: Any, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    gated, upped = _product(rows, gate.t()), _product(rows, up.t())
    ctx.save_for_backward(x, gated, upped, gate, up, down)
    return _product(_activate(gated, upped, *scratch(gated, gated.shape)), down.t()).view(x.shape)


@once_differentiable
def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, gated, upped, gate, up, down = ctx.saved_tensors
    need_x, need_gate, need_up, need_down = ctx.needs_input_grad
    rows, drows = (t.reshape(-1, t.shape[-1]) for t in (x, dy))
    active, dactive = scratch(gated, gated.shape, gated.shape)
    _activate(gated, upped, active)
    ddown = _product(drows.t(), active) if need_down else None
    multiply_(dactive, drows, down)
    # In the place of what is not needed any more.
    dgated, dupped = dactive, active
    _core.glu_bwd(
        capsule(dactive), capsule(gated), capsule(upped), capsule(dgated), capsule(dupped), "silu"
    )
    dx = None
    if need_x:
        dx = _product(dgated, gate).add_(_product(dupped, up)).view(x.shape)
    return (
        dx,
        _product(dgated.t(), rows) if need_gate else None,
        _product(dupped.t(), rows) if need_up else None,
        ddown,
    )


_gated_mlp = direct_function("gated_mlp", _forward, _backward)
