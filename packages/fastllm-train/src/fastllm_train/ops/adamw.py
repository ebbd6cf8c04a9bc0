"""One AdamW step on one tensor, in place (Loshchilov and Hutter, arXiv:1711.05101).

Master weight and moments are float32; a copy of the weight in the model's dtype is written in the
same pass over memory. The formula, in ``cpp/include/fastllm/adamw.hpp``, is that of
``torch.optim.AdamW``.
"""

from __future__ import annotations

import torch

from fastllm_core import _core
from fastllm_train.ops.registration import capsule, define, stream_of

__all__ = ["adamw_"]


def adamw_(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: torch.Tensor | None = None,
    model: torch.Tensor | None = None,
) -> None:
    """Updates ``master``, ``exp_avg`` and ``exp_avg_sq``, and writes ``model``.

    Args:
        master: float32, any shape, contiguous, as are the other tensors of that shape.
        grad: float32, bfloat16 or float16.
        exp_avg: float32, first moment.
        exp_avg_sq: float32, second moment.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
        step: 1 for the first step.
        grad_scale: float32, one element, on the same device: the gradient is multiplied by it, for
            clipping by norm or a loss scale. It is not read by the host.
        model: receives the new weight, rounded to its dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a tensor is not contiguous.
    """
    _adamw(
        master, grad, exp_avg, exp_avg_sq, model, grad_scale, lr, *betas, eps, weight_decay, step
    )


def _kernel(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    model: torch.Tensor | None,
    grad_scale: torch.Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    _core.adamw(
        capsule(master),
        capsule(grad),
        capsule(exp_avg),
        capsule(exp_avg_sq),
        None if model is None else capsule(model),
        None if grad_scale is None else capsule(grad_scale),
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        step,
        stream_of(master),
    )


def _fake(*_: object) -> None:
    return None


_adamw = define(
    "adamw_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)? model, Tensor? grad_scale, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, int step) -> ()",
    _kernel,
    _fake,
    mutates=(0, 2, 3, 4),
)
