"""Differentiable collectives.

Activations are [B, S, H]; "sequence" collectives act on dimension 1. Each function's backward pass
is the transpose of its forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

# torch 2.13 renamed the one-tensor collectives and warns about the old names.
all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

SEQUENCE = 1
# Collectives that go on beside what follows, and that torch.compile knows.
_functional = torch.ops._c10d_functional


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S/tp, H] on each rank → the whole [B, S, H], without a gradient."""
    front = x.movedim(SEQUENCE, 0).contiguous()
    whole = front.new_empty(front.shape[0] * group.size(), *front.shape[1:])
    all_gather_into(whole, front, group=group)
    # Products take rows that lie together: each would make, and keep, a copy of its own.
    return whole.movedim(0, SEQUENCE).contiguous()


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    front = x.movedim(SEQUENCE, 0).contiguous()
    part = front.new_empty(front.shape[0] // group.size(), *front.shape[1:])
    reduce_scatter_into(part, front, group=group)
    return part.movedim(0, SEQUENCE)


def start_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to add up x over the ranks. Neither x nor the result may be touched before
    ``finish_sum`` of the latter."""
    return _functional.all_reduce(x, "sum", group.group_name)


def finish_sum(total: Tensor) -> Tensor:
    return _functional.wait_tensor(total)


def start_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Begin to add up x [B, S, H] over the ranks, of which each keeps its positions; as
    ``start_sum``."""
    front = x.movedim(SEQUENCE, 0).contiguous()
    return _functional.reduce_scatter_tensor(front, "sum", group.size(), group.group_name)


def finish_scatter(part: Tensor) -> Tensor:
    """[B, S/tp, H]."""
    return _functional.wait_tensor(part).movedim(0, SEQUENCE)


class _SumGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _all_reduced(grads[0], ctx.group), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        del ctx
        return _all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx
        return grads[0], None


class _GatherSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scattered(grads[0], ctx.group), None


class _ScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return gathered(grads[0], ctx.group), None


class _MeanOfReplicated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.size = group.size()
        return _all_reduced(x, group) / ctx.size

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] / ctx.size, None


class _MeanOfSummed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(x, group) / group.size()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _all_reduced(grads[0], ctx.group) / ctx.group.size(), None


def _exchanged(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group)
    return out


class _ExchangeRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _exchanged(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _transposed(x: Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> Tensor:
    parts = torch.stack(x.chunk(group.size(), dim=cut)).contiguous()
    out = torch.empty_like(parts)
    dist.all_to_all_single(out, parts, group=group)
    return torch.cat(out.unbind(0), dim=joined)


class _ExchangeDimensions(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> Tensor:
        ctx.cut, ctx.joined, ctx.group = cut, joined, group
        return _transposed(x, cut, joined, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _transposed(grads[0], ctx.joined, ctx.cut, ctx.group), None, None, None


def sum_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x itself; its gradient is summed over the ranks, each of which computed a part of it."""
    return _SumGradient.apply(x, group)  # type: ignore[no-any-return]


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Σ x over the ranks, on every rank."""
    return _Sum.apply(x, group)  # type: ignore[no-any-return]


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S/tp, H] on each rank → the whole [B, S, H]; gradients are summed and cut again."""
    return _GatherSequence.apply(x, group)  # type: ignore[no-any-return]


def scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Σ over the ranks of [B, S, H], of which each keeps its [B, S/tp, H]."""
    return _ScatterSequence.apply(x, group)  # type: ignore[no-any-return]


def mean_of_replicated(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean of x over the ranks, for a loss that each of them computes and that counts once."""
    return _MeanOfReplicated.apply(x, group)  # type: ignore[no-any-return]


def mean_of_summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean of x over the ranks, for losses that differ between them and add up."""
    return _MeanOfSummed.apply(x, group)  # type: ignore[no-any-return]


def exchange_rows(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Rows of x: the first ``sent[0]`` go to rank 0, the next ``sent[1]`` to rank 1, …; the result
    is ``received[0]`` rows of rank 0, then those of rank 1, …"""
    return _ExchangeRows.apply(x, sent, received, group)  # type: ignore[no-any-return]


def exchange_dimensions(x: Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> Tensor:
    """Dimension ``joined`` made whole, dimension ``cut`` divided over the ranks instead."""
    return _ExchangeDimensions.apply(x, cut, joined, group)  # type: ignore[no-any-return]
