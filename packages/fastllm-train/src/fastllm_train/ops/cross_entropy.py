"""Cross entropy of logits with integer labels, per token, also over a divided vocabulary.

    loss = log(sum_c exp(logits_c)) - logits_label

in float32 from logits of any dtype, which are not copied to float32. Forward and backward read the
logits once each (formulas in ``cpp/include/fastllm/cross_entropy.hpp``). With a process group each
rank holds consecutive columns of the logits, and only three numbers per row are exchanged, as in
Megatron-LM (Shoeybi et al., arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastllm_core import _core
from fastllm_train.ops.registration import (
    contiguous_capsule,
    define,
    define_differentiable,
    runs_directly,
    stream_of,
)

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    first: int = 0,
    group: dist.ProcessGroup | None = None,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """The loss of every row.

    Args:
        logits: shape ``(..., cols)``; float32, bfloat16 or float16. Columns are tokens
            ``first .. first + cols - 1``.
        labels: int64, the shape of ``logits`` without its last dimension.
        ignore_index: rows with this label have loss 0 and no gradient.
        first: the first token of this rank's columns.
        group: ranks that hold the other columns of the same rows; None if this rank holds all.
        inplace_backward: the gradient overwrites the logits, which saves their size in memory. Only
            for logits that nothing else needs after the forward pass, and one backward pass; under
            ``torch.compile`` it has no effect.

    Returns:
        float32 losses, the shape of ``labels``. NaN for a label that no rank has.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    flat, flat_labels = logits, labels
    if logits.dim() != 2:
        flat, flat_labels = logits.flatten(0, -2), labels.flatten()
    if group is None and first == 0:
        losses, _ = _loss(flat, flat_labels, ignore_index, inplace_backward)
    else:
        losses = _Divided.apply(flat, flat_labels, ignore_index, first, group, inplace_backward)
    return losses if logits.dim() == 2 else losses.view(labels.shape)


def joined(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    labels: torch.Tensor,
    columns: tuple[int, int],
    ignore: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and log-sum-exp of rows whose columns are divided over a group.

    Args:
        parts: max, sum and target of this rank's columns, as ``cross_entropy_fwd`` gives them.
        labels: int64, of the rows.
        columns: first token here, and the first that is not.
        ignore: rows with this label have loss 0.
        group: the ranks that hold the other columns; None if there are none.
    """
    largest, total, target = parts
    found = (labels >= columns[0]) & (labels < columns[1])
    if group is not None:
        here = largest
        largest = here.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        # exp(-inf + inf) would be NaN where a rank has nothing but -inf.
        scale = torch.where(here == largest, 1.0, (here - largest).exp())
        sums = torch.stack((total * scale, target, found.float()))
        dist.all_reduce(sums, group=group)
        total, target, found = sums[0], sums[1], sums[2] > 0
    lse = largest + total.log()
    losses = torch.where(found, lse - target, torch.nan)
    return torch.where(labels == ignore, 0.0, losses), lse


def losses_of(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore: int,
    first: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and log-sum-exp of rows of logits [N, cols], without a gradient of their own.
    Arguments as for :func:`cross_entropy`."""
    if group is None and first == 0:
        return _loss(logits, labels, ignore, False)
    columns = (first, first + logits.shape[-1])
    return joined(_fwd(logits, labels, first, ignore), labels, columns, ignore, group)


def become_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    ignore: int,
    first: int,
) -> None:
    """Overwrite contiguous logits [N, cols] with the gradient of Σ dloss * loss."""
    _bwd_(logits, labels, lse, dloss, first, ignore)


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        ignore: int,
        first: int,
        group: dist.ProcessGroup | None,
        inplace: bool,
    ) -> torch.Tensor:
        losses, lse = losses_of(logits, labels, ignore, first, group)
        ctx.save_for_backward(logits, labels, lse)
        ctx.ignore, ctx.first, ctx.inplace = ignore, first, inplace
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        return _dlogits(ctx, gradients[0], ctx.first), None, None, None, None, None


def _dlogits(ctx: Any, dloss: torch.Tensor, first: int) -> torch.Tensor:
    logits, labels, lse = ctx.saved_tensors
    if ctx.inplace and runs_directly((logits,)):
        _bwd_(logits, labels, lse, dloss, first, ctx.ignore)
        return logits
    return _bwd(logits, labels, lse, dloss, first, ctx.ignore)


def _loss_kernel(
    logits: torch.Tensor, labels: torch.Tensor, ignore: int, inplace_backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    losses, lse = outputs = _loss_fake(logits, labels, ignore, inplace_backward)
    _core.cross_entropy_loss(
        contiguous_capsule(logits),
        contiguous_capsule(labels),
        contiguous_capsule(lse),
        contiguous_capsule(losses),
        ignore,
        stream_of(logits),
    )
    return outputs


def _loss_fake(
    logits: torch.Tensor, labels: torch.Tensor, ignore: int, inplace_backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return losses, torch.empty_like(losses)


def _loss_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    logits, labels, ctx.ignore, ctx.inplace = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _loss_backward(ctx: Any, dloss: torch.Tensor, _dlse: torch.Tensor) -> tuple[Any, ...]:
    return _dlogits(ctx, dloss, 0), None, None, None


def _fwd_kernel(
    logits: torch.Tensor, labels: torch.Tensor, first: int, ignore: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    largest, total, target = outputs = _fwd_fake(logits, labels, first, ignore)
    _core.cross_entropy_fwd(
        contiguous_capsule(logits),
        contiguous_capsule(labels),
        contiguous_capsule(largest),
        contiguous_capsule(total),
        contiguous_capsule(target),
        first,
        ignore,
        False,
        stream_of(logits),
    )
    return outputs


def _fwd_fake(
    logits: torch.Tensor, labels: torch.Tensor, first: int, ignore: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def per_row() -> torch.Tensor:
        return logits.new_empty(logits.shape[0], dtype=torch.float32)

    return per_row(), per_row(), per_row()


def _bwd_into(
    dlogits: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    first: int,
    ignore: int,
) -> None:
    _core.cross_entropy_bwd(
        contiguous_capsule(logits),
        contiguous_capsule(labels),
        contiguous_capsule(lse),
        contiguous_capsule(dloss.float()),
        contiguous_capsule(dlogits),
        first,
        ignore,
        stream_of(logits),
    )


def _bwd_kernel(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    first: int,
    ignore: int,
) -> torch.Tensor:
    dlogits = logits.new_empty(logits.shape)
    _bwd_into(dlogits, logits, labels, lse, dloss, first, ignore)
    return dlogits


def _bwd_fake(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _bwd_inplace_kernel(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    first: int,
    ignore: int,
) -> None:
    if logits.is_contiguous():
        _bwd_into(logits, logits, labels, lse, dloss, first, ignore)
    else:
        logits.copy_(_bwd_kernel(logits, labels, lse, dloss, first, ignore))


def _bwd_inplace_fake(logits: torch.Tensor, *_: Any) -> None:
    return None


_loss = define_differentiable(
    "cross_entropy_loss(Tensor logits, Tensor labels, int ignore, bool inplace_backward)"
    " -> (Tensor loss, Tensor lse)",
    _loss_kernel,
    _loss_fake,
    _loss_setup,
    _loss_backward,
)
_fwd = define(
    "cross_entropy_fwd(Tensor logits, Tensor labels, int first, int ignore)"
    " -> (Tensor max, Tensor sum, Tensor target)",
    _fwd_kernel,
    _fwd_fake,
)
_BWD_ARGUMENTS = "Tensor labels, Tensor lse, Tensor dloss, int first, int ignore"
_bwd = define(
    f"cross_entropy_bwd(Tensor logits, {_BWD_ARGUMENTS}) -> Tensor", _bwd_kernel, _bwd_fake
)
_bwd_ = define(
    f"cross_entropy_bwd_(Tensor(a!) logits, {_BWD_ARGUMENTS}) -> ()",
    _bwd_inplace_kernel,
    _bwd_inplace_fake,
    mutates=(0,),
)
