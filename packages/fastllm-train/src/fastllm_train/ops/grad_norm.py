"""Norm of a set of gradients, and clipping by it.

The norm is a float32 sum of squares over fixed parts, then a float64 sum over the parts of all
tensors in their order: the same gradients give the same bits, on the CPU for any number of threads.
Nothing waits for the device. To clip without a pass over memory of its own, give
:func:`clip_coefficient` to ``adamw_`` as ``grad_scale``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fastllm_core import _core
from fastllm_train.ops.registration import contiguous_capsule, define, stream_of

__all__ = ["clip_coefficient", "clip_grad_norm_", "grad_norm", "sum_of_squares"]


def grad_norm(grads: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all elements together.

    Args:
        grads: float32, bfloat16 or float16, any shapes, on one device.

    Returns:
        float32, a scalar on that device. NaN or infinite where an element is.

    Raises:
        ValueError: there is no tensor, or one has another dtype.
    """
    grads = list(grads)
    if not grads:
        raise ValueError("grad_norm: no gradients")
    return sum_of_squares(grads, grads[0].device).sqrt().float()


def sum_of_squares(grads: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The square of the norm, to be added up over ranks that hold parts of a model.

    Args:
        grads: as :func:`grad_norm`, of that device; there may be none.

    Returns:
        float64, a scalar on the device.

    Raises:
        ValueError: a gradient has another dtype.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    squares = [_squared_sum(grad) for grad in grads]
    return torch.stack(squares).sum() if len(squares) > 1 else squares[0]


def clip_coefficient(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of that norm are to be multiplied by, as in ``clip_grad_norm_`` of torch.

    Args:
        norm: float32, a scalar.
        max_norm: the largest norm to keep.

    Returns:
        ``min(1, max_norm / (norm + 1e-6))``, a float32 scalar on the device of ``norm``.
    """
    return (max_norm / (norm + 1e-6)).clamp_(max=1.0)


def clip_grad_norm_(grads: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scales the gradients in place so that their norm is at most ``max_norm``.

    Returns:
        The norm before, a float32 scalar.

    Raises:
        ValueError: as :func:`grad_norm`.
    """
    grads = list(grads)
    norm = grad_norm(grads)
    coefficient = clip_coefficient(norm, max_norm)
    for grad in grads:
        grad.mul_(coefficient)
    return norm


def _kernel(x: torch.Tensor) -> torch.Tensor:
    parts = _core.squared_sum_parts(x.numel(), x.is_cuda)
    partial = torch.empty(parts, dtype=torch.float32, device=x.device)
    _core.squared_sum(contiguous_capsule(x), contiguous_capsule(partial), stream_of(x))
    return partial.sum(dtype=torch.float64)


def _fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((), dtype=torch.float64)


_squared_sum = define("squared_sum(Tensor x) -> Tensor", _kernel, _fake)
