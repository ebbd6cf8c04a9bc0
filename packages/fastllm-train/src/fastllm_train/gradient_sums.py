"""A step's gradients, added up over micro-batches and over replicas.

A replica that is alone and adds up in the model's type needs nothing of this: autograd's ``grad``
is the sum, made without a copy. Else a gradient is added into a flat buffer as soon as autograd has
it, and given up. Buffers are cut into buckets, the last parameters first, as a backward pass comes
by them; in the step's last one a bucket is reduced over the replicas as soon as it is whole, beside
the rest of the pass (Li et al. 2020, arXiv:2006.15704, section 3.2).

Buckets are reduced in their order, on every rank the same, whatever order gradients come in; so the
result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm_planner.arch import ParamSpec
from fastllm_train.mesh import Mesh

BUCKET_BYTES = 32 * 2**20
ALIGNED_TO = 64  # bytes: a cache line, and more than any vector register wants


@dataclass
class _Bucket:
    """A part of a flat buffer that is reduced at once."""

    flat: Tensor
    group: dist.ProcessGroup
    waits_for: int = 0  # parameters whose gradients are not there yet
    of: int = 0


@dataclass
class _Place:
    """Where a parameter's sum lies."""

    sum: Tensor
    bucket: _Bucket
    filled: bool = field(default=False)


class GradientSums:
    """Sums of the gradients of ``parameters``, of type ``dtype``; ``group`` of each: the ranks that
    hold the same one and see other tokens. Collective operations run in ``before_backward``'s last
    pass and in ``finish``."""

    def __init__(
        self,
        parameters: Sequence[tuple[nn.Parameter, dist.ProcessGroup]],
        dtype: torch.dtype,
    ) -> None:
        self._parameters = [param for param, _ in parameters]
        self._last = False
        self._next = 0
        self._buckets: list[_Bucket] = []
        self._underway: list[dist.Work] = []
        self._places: dict[nn.Parameter, _Place] = {}
        separate = [(p, group) for p, group in parameters if group.size() > 1 or p.dtype != dtype]
        for group, members in _by_group(separate):
            self._lay_out(members, group, dtype)
        for param in self._places:
            param.register_post_accumulate_grad_hook(self._ready)

    def of(self, param: nn.Parameter) -> Tensor | None:
        """The sum, until ``clear``; None where no gradient came. Over replicas after ``finish``."""
        place = self._places.get(param)
        return param.grad if place is None else place.sum

    def before_backward(self, *, last: bool) -> None:
        """``last``: the step's last micro-batch."""
        self._last = last

    def finish(self) -> None:
        """After the last backward pass: reduce what was not ready, wait for all."""
        for place in self._places.values():
            if not place.filled:
                place.sum.zero_()
        for bucket in self._buckets:
            bucket.waits_for = 0
        self._reduce_whole_ones()
        for work in self._underway:
            work.wait()
        self._underway.clear()

    def clear(self) -> None:
        """Before the next step."""
        self._last, self._next = False, 0
        for param in self._parameters:
            param.grad = None
        for place in self._places.values():
            place.filled = False
        for bucket in self._buckets:
            bucket.waits_for = bucket.of

    def _lay_out(
        self,
        members: Sequence[nn.Parameter],
        group: dist.ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        step = ALIGNED_TO // dtype.itemsize
        sizes = [-(-param.numel() // step) * step for param in members]
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=members[0].device)
        start = end = 0
        pending: list[nn.Parameter] = []
        for index, (param, size) in enumerate(zip(members, sizes, strict=True)):
            pending.append(param)
            end += size
            whole = (end - start) * dtype.itemsize >= BUCKET_BYTES
            if not whole and index < len(members) - 1:
                continue
            bucket = _Bucket(buffer[start:end], group, len(pending), len(pending))
            at = 0
            for held in pending:
                view = bucket.flat[at : at + held.numel()].view(held.shape)
                self._places[held] = _Place(view, bucket)
                at += -(-held.numel() // step) * step
            self._buckets.append(bucket)
            start, pending = end, []

    def _ready(self, param: Any) -> None:
        """Autograd has added a micro-batch's gradient to ``param.grad``."""
        place, grad = self._places[param], param.grad
        if place.filled:
            place.sum.add_(grad)
        else:
            place.sum.copy_(grad)
            place.filled = True
        param.grad = None
        if self._last:
            place.bucket.waits_for -= 1
            self._reduce_whole_ones()

    def _reduce_whole_ones(self) -> None:
        while self._next < len(self._buckets) and not self._buckets[self._next].waits_for:
            work = self._reduce(self._buckets[self._next].flat, self._buckets[self._next].group)
            if work is not None:
                self._underway.append(work)
            self._next += 1

    def _reduce(self, flat: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
        return dist.all_reduce(flat, group=group, async_op=True) if group.size() > 1 else None


def shared_out(param: ParamSpec, mesh: Mesh) -> bool:
    """Whether ``param`` is of an expert that only some replicas hold."""
    return param.expert is not None and mesh.parallel.ep > 1


def replica_groups(
    parameters: Iterable[tuple[ParamSpec, nn.Parameter]], mesh: Mesh
) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
    """Parameters with the ranks that hold the same one and see other tokens."""
    return [
        (held, mesh.expert_data_group if shared_out(param, mesh) else mesh.data_group)
        for param, held in parameters
    ]


def _by_group(
    parameters: Iterable[tuple[nn.Parameter, dist.ProcessGroup]],
) -> list[tuple[dist.ProcessGroup, list[nn.Parameter]]]:
    """The last parameters first."""
    found: dict[int, tuple[dist.ProcessGroup, list[nn.Parameter]]] = {}
    for param, group in reversed(list(parameters)):
        found.setdefault(id(group), (group, []))[1].append(param)
    return list(found.values())
