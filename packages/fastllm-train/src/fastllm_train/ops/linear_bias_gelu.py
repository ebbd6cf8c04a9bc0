"""Linear layer and GELU (tanh form): ``gelu(x @ weight.T + bias)``.

In one kernel where fastllm_core has it (``ops.gemm``), which also writes what stands before the
GELU, for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from fastllm_train.ops.gemm import kernels, require_linear, takes
from fastllm_train.ops.registration import contiguous_capsule, define_differentiable, stream_of

__all__ = ["linear_bias_gelu"]


def linear_bias_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x @ weight.T + bias), by the tanh approximation (Hendrycks and Gimpel, 2016).

    Args:
        x: shape ``(..., k)``; float32, bfloat16 or float16.
        weight: shape ``(n, k)``, the dtype and device of ``x``.
        bias: shape ``(n,)``, likewise.

    Returns:
        Shape ``(..., n)``, the dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    require_linear("linear_bias_gelu", x, "weight", weight)
    if bias.shape != weight.shape[:1] or bias.dtype != x.dtype:
        raise ValueError(
            f"linear_bias_gelu: bias has shape {tuple(bias.shape)} of {bias.dtype},"
            f" expected {tuple(weight.shape[:1])} of {x.dtype}"
        )
    y, _ = _linear_bias_gelu_fwd(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _fwd_kernel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if not takes(x, weight):
        pre = torch.addmm(bias, x, weight.t())
        return torch.nn.functional.gelu(pre, approximate="tanh"), pre
    y, pre = _fwd_fake(x, weight, bias)
    kernels.linear_bias_gelu(
        contiguous_capsule(x),
        contiguous_capsule(weight),
        contiguous_capsule(bias),
        contiguous_capsule(y),
        contiguous_capsule(pre),
        stream_of(x),
    )
    return y, pre


def _fwd_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x.shape[0], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _ = inputs
    _, pre = output
    ctx.save_for_backward(x, weight, pre)
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, _dpre: None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None
    x, weight, pre = ctx.saved_tensors
    dpre = torch.ops.aten.gelu_backward(dy, pre, approximate="tanh")
    return (
        dpre @ weight if ctx.needs_input_grad[0] else None,
        dpre.t() @ x if ctx.needs_input_grad[1] else None,
        dpre.sum(0) if ctx.needs_input_grad[2] else None,
    )


_linear_bias_gelu_fwd = define_differentiable(
    "linear_bias_gelu_fwd(Tensor x, Tensor weight, Tensor bias) -> (Tensor y, Tensor pre)",
    _fwd_kernel,
    _fwd_fake,
    _setup,
    _backward,
)
