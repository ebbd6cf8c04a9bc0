"""Gated linear units without their products: SwiGLU and GeGLU (Shazeer, arXiv:2002.05202).

    swiglu(gate, up) = silu(gate) * up;  geglu(gate, up) = gelu(gate) * up, gelu by its tanh form

element by element, computed in float32 and rounded once; neither the activation nor its derivative
is kept for the backward pass (formulas in ``cpp/include/fastllm/glu.hpp``).
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

__all__ = ["geglu", "swiglu"]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate: any shape; float32, bfloat16 or float16, on the CPU or a CUDA device.
        up: the shape, dtype and device of ``gate``.

    Returns:
        A tensor of that shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _glu_fwd(gate, up, "silu")


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, with the tanh form of GELU. Arguments as for :func:`swiglu`."""
    return _glu_fwd(gate, up, "gelu")


def _fwd_kernel(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _core.glu_fwd(
        contiguous_capsule(gate),
        contiguous_capsule(up),
        contiguous_capsule(y),
        activation,
        stream_of(gate),
    )
    return y


def _fwd_fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _bwd_kernel(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _core.glu_bwd(
        contiguous_capsule(dy),
        contiguous_capsule(gate),
        contiguous_capsule(up),
        contiguous_capsule(dgate),
        contiguous_capsule(dup),
        activation,
        stream_of(gate),
    )
    return dgate, dup


def _bwd_fake(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_glu_bwd = define(
    "glu_bwd(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)",
    _bwd_kernel,
    _bwd_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    gate, up = ctx.saved_tensors
    return *_glu_bwd(dy, gate, up, ctx.activation), None


_glu_fwd = define_differentiable(
    "glu_fwd(Tensor gate, Tensor up, str activation) -> Tensor",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
