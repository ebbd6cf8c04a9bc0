"""One AdamW step on one tensor, in place (Loshchilov and Hutter, arXiv:1711.05101).

Master weight and moments are float32; a copy of the weight in the model's dtype is written in the
same pass over memory. A bfloat16 model can share its bits with the master: the weight is the upper
half of it, an int16 the lower one (``split_``, ``joined``). The formula, in
``cpp/include/fastllm/adamw.hpp``, is that of ``torch.optim.AdamW``.
"""

from __future__ import annotations

import torch

from fastllm_core import _core
from fastllm_train.ops.registration import capsule, define, stream_of

__all__ = ["adamw_", "joined", "split_"]

QUIET_NAN = 0x7FC00000


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
        master: float32, any shape, contiguous, as are the other tensors of that shape. Or
            int16, the lower halves of masters whose upper halves are ``model``.
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
        model: receives the new weight, rounded to its dtype. With an int16 ``master``: bfloat16,
            read and written.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a tensor is not contiguous.
    """
    _adamw(
        master, grad, exp_avg, exp_avg_sq, model, grad_scale, lr, *betas, eps, weight_decay, step
    )


def joined(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """The float32 values, of any shape, whose halves these bfloat16 and int16 tensors are: bits of
    ``upper`` times 2^16, plus ``lower``. The inverse of ``split_``."""
    bits = upper.view(torch.int16).to(torch.int32)
    return bits.bitwise_left_shift_(16).add_(lower).view(torch.float32)


def split_(values: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor) -> None:
    """Writes the halves of contiguous float32 ``values``: ``upper``, bfloat16, is the value rounded
    to nearest, ties away from zero; ``lower``, int16, the rest of its bits. NaN loses its payload.
    """
    bits = values.view(torch.int32).masked_fill(values.isnan(), QUIET_NAN)
    upper.view(torch.int16).copy_(bits.add(0x8000).bitwise_right_shift_(16))
    lower.copy_(bits.bitwise_left_shift_(16).bitwise_right_shift_(16))


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
