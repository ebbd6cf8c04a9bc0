"""A linear layer's weight gradient, added to a float32 main gradient: ``dw += dy.T @ x``.

Nothing in between is rounded to half precision; in one kernel where fastllm_core has it
(``ops.gemm``).
"""

from __future__ import annotations

import torch

from fastllm_train.ops.gemm import kernels, takes
from fastllm_train.ops.registration import contiguous_capsule, define, stream_of

__all__ = ["linear_weight_grad_"]


def linear_weight_grad_(dw: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dw += dy.T @ x, in float32 throughout.

    Args:
        dw: float32, shape ``(n, k)``, contiguous; written in place.
        dy: shape ``(..., n)``; float32, bfloat16 or float16.
        x: shape ``(..., k)``, the dtype and device of ``dy``.

    Returns:
        ``dw``.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or ``dw`` is not contiguous.
    """
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if dy.shape[0] != x.shape[0] or dw.shape != (dy.shape[1], x.shape[1]):
        raise ValueError(
            f"linear_weight_grad: dw has shape {tuple(dw.shape)}, dy {tuple(dy.shape)} and x"
            f" {tuple(x.shape)}, expected (n, k), (rows, n) and (rows, k)"
        )
    if dw.dtype != torch.float32 or dy.dtype != x.dtype or not dw.is_contiguous():
        raise ValueError(
            f"linear_weight_grad: dw is {dw.dtype}, dy {dy.dtype} and x {x.dtype};"
            " expected contiguous float32, and one dtype for dy and x"
        )
    _linear_weight_grad(dw, dy, x)
    return dw


def _kernel(dw: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    if takes(x, dw) and dy.data_ptr() % 16 == 0:
        kernels.linear_weight_grad(
            contiguous_capsule(dy), contiguous_capsule(x), contiguous_capsule(dw), stream_of(x)
        )
    else:
        dw.addmm_(dy.float().t(), x.float())


def _fake(dw: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    return None


_linear_weight_grad = define(
    "linear_weight_grad(Tensor(a!) dw, Tensor dy, Tensor x) -> ()", _kernel, _fake, mutates=(0,)
)
