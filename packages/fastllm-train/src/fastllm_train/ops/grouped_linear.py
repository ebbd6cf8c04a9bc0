"""One linear layer per group of rows, as experts are: ``y[of g] = x[of g] @ weight[g].T``.

One kernel for all groups where fastllm_core has it (see ``ops.gemm``), for which the host need not
know how many rows each group has; elsewhere one product of torch's a group, for which it must.
"""

from __future__ import annotations

from typing import Any

import torch

from fastllm_train.ops.gemm import kernels, takes
from fastllm_train.ops.registration import (
    contiguous_capsule,
    define,
    define_differentiable,
    stream_of,
)

__all__ = ["grouped_linear"]


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Rows ``offsets[g] .. offsets[g + 1] - 1`` of x times ``weight[g].T``.

    Args:
        x: shape ``(rows, k)``; float32, bfloat16 or float16.
        weight: shape ``(groups, n, k)``, the dtype and device of ``x``.
        offsets: int64, shape ``(groups + 1,)``, ascending from 0 to ``rows``, beside ``x``.

    Returns:
        Shape ``(rows, n)``, the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"grouped_linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)},"
            " expected (rows, k) and (groups, n, k)"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"grouped_linear: weight is {weight.dtype} on {weight.device},"
            f" expected {x.dtype} on {x.device}"
        )
    if offsets.dtype != torch.int64 or offsets.shape != (weight.shape[0] + 1,):
        raise ValueError(
            f"grouped_linear: offsets has shape {tuple(offsets.shape)} of {offsets.dtype},"
            f" expected ({weight.shape[0] + 1},) of torch.int64"
        )
    return _grouped_linear_fwd(x, weight, offsets)


def _fwd_kernel(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    y = _fwd_fake(x, weight, offsets)
    if takes(x, weight):
        groups = weight.shape[0]
        words = (kernels.grouped_workspace_bytes(groups) + 7) // 8
        kernels.grouped_linear(
            contiguous_capsule(x),
            contiguous_capsule(weight),
            contiguous_capsule(offsets),
            contiguous_capsule(y),
            contiguous_capsule(offsets.new_empty(words)),
            stream_of(x),
        )
        return y
    at = offsets.tolist()
    for g in range(weight.shape[0]):
        torch.mm(x[at[g] : at[g + 1]], weight[g].t(), out=y[at[g] : at[g + 1]])
    return y


def _fwd_fake(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def _weight_grad_kernel(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    dw = _weight_grad_fake(dy, x, offsets)
    at = offsets.tolist()
    for g in range(dw.shape[0]):
        torch.mm(dy[at[g] : at[g + 1]].t(), x[at[g] : at[g + 1]], out=dw[g])
    return dw


def _weight_grad_fake(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty((offsets.shape[0] - 1, dy.shape[1], x.shape[1]))


_grouped_weight_grad = define(
    "grouped_linear_weight_grad(Tensor dy, Tensor x, Tensor offsets) -> Tensor",
    _weight_grad_kernel,
    _weight_grad_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, weight, offsets = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = _grouped_linear_fwd(dy, weight.transpose(1, 2).contiguous(), offsets)
    if ctx.needs_input_grad[1]:
        dw = _grouped_weight_grad(dy, x, offsets)
    return dx, dw, None


_grouped_linear_fwd = define_differentiable(
    "grouped_linear_fwd(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
