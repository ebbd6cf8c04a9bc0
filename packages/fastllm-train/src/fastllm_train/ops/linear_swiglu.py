"""Both products of a gated layer and SwiGLU: ``silu(x @ wg.T) * (x @ wu.T)``.

In one kernel that reads x once, where fastllm_core has it (``ops.gemm``).
"""

from __future__ import annotations

from typing import Any

import torch

from fastllm_train.ops import glu
from fastllm_train.ops.gemm import kernels, require_linear, takes
from fastllm_train.ops.registration import contiguous_capsule, define_differentiable, stream_of

__all__ = ["linear_swiglu"]


def linear_swiglu(x: torch.Tensor, wg: torch.Tensor, wu: torch.Tensor) -> torch.Tensor:
    """silu(x @ wg.T) * (x @ wu.T); the two products are kept for the backward pass.

    Args:
        x: shape ``(..., k)``; float32, bfloat16 or float16.
        wg: the gate's weight, shape ``(n, k)``, the dtype and device of ``x``.
        wu: as ``wg``.

    Returns:
        Shape ``(..., n)``, the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    require_linear("linear_swiglu", x, "wg", wg)
    require_linear("linear_swiglu", x, "wu", wu)
    if wg.shape != wu.shape:
        raise ValueError(
            f"linear_swiglu: wu has shape {tuple(wu.shape)}, expected {tuple(wg.shape)}"
        )
    y, _, _ = _linear_swiglu_fwd(x.reshape(-1, x.shape[-1]), wg, wu)
    return y.view(*x.shape[:-1], wg.shape[0])


_Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _fwd_kernel(x: torch.Tensor, wg: torch.Tensor, wu: torch.Tensor) -> _Three:
    if not (takes(x, wg) and takes(x, wu)):
        gate, up = x @ wg.t(), x @ wu.t()
        return glu.swiglu(gate, up), gate, up
    y, gate, up = _fwd_fake(x, wg, wu)
    kernels.linear_swiglu(
        contiguous_capsule(x),
        contiguous_capsule(wg),
        contiguous_capsule(wu),
        contiguous_capsule(gate),
        contiguous_capsule(up),
        contiguous_capsule(y),
        stream_of(x),
    )
    return y, gate, up


def _fwd_fake(x: torch.Tensor, wg: torch.Tensor, wu: torch.Tensor) -> _Three:
    shape = (x.shape[0], wg.shape[0])
    return x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: _Three) -> None:
    _, gate, up = output
    ctx.save_for_backward(*inputs, gate, up)
    ctx.mark_non_differentiable(gate, up)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _dgate: None, _dup: None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None
    x, wg, wu, gate, up = ctx.saved_tensors
    dgate, dup = torch.ops.fastllm.glu_bwd(dy, gate, up, "silu")
    return (
        torch.addmm(dgate @ wg, dup, wu) if ctx.needs_input_grad[0] else None,
        dgate.t() @ x if ctx.needs_input_grad[1] else None,
        dup.t() @ x if ctx.needs_input_grad[2] else None,
    )


_linear_swiglu_fwd = define_differentiable(
    "linear_swiglu_fwd(Tensor x, Tensor wg, Tensor wu) -> (Tensor y, Tensor gate, Tensor up)",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
