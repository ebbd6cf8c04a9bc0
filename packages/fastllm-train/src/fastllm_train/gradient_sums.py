"""A step's gradients, added up over micro-batches and over replicas.

A replica that is alone and adds up in the model's type needs nothing of this: autograd's ``grad``
is the sum, made without a copy. Else a gradient is added into a flat buffer as soon as autograd has
it, and given up. Buffers are cut into buckets, the last parameters first, as a backward pass comes
by them; in the step's last one a bucket is reduced over the replicas as soon as it is whole, beside
the rest of the pass (Li et al. 2020, arXiv:2006.15704, section 3.2).

Buckets are reduced in their order, on every rank the same, whatever order gradients come in; so the
result does not depend on timing.

Cut over the replicas (ZeRO-1), each rank needs the sum of its share of a bucket only: NCCL scatters
it. gloo adds up the whole bucket, which it does in half the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm_planner.arch import ParamSpec
from fastllm_train.collectives import reduce_scatter_into
from fastllm_train.mesh import Mesh

BUCKET_BYTES = 32 * 2**20
ALIGNED_TO = 64  # bytes: a cache line, and more than any vector register wants


@dataclass
class Bucket:
    """A part of a flat buffer that is reduced at once. ``offsets``: its parameters and the element
    at which each begins. ``cut``: each rank of ``group`` has use for an equal share only."""

    flat: Tensor
    group: dist.ProcessGroup
    offsets: Sequence[tuple[nn.Parameter, int]]
    cut: bool
    waits_for: int = 0  # parameters whose gradients are not there yet

    @property
    def share(self) -> slice:
        """Elements that this rank updates."""
        if not self.cut:
            return slice(0, self.flat.numel())
        size = self.flat.numel() // self.group.size()
        return slice(self.group.rank() * size, (self.group.rank() + 1) * size)

    def of_share(self, param: nn.Parameter, offset: int) -> tuple[int, int]:
        """First and last (exclusive) element of the bucket that are of ``param``, which begins at
        ``offset``, and in this rank's share. The range may be empty."""
        share = self.share
        begin = max(share.start, offset)
        return begin, max(begin, min(share.stop, offset + param.numel()))


@dataclass
class _Place:
    """Where a parameter's sum lies."""

    sum: Tensor
    bucket: Bucket
    offset: int
    filled: bool = field(default=False)


class GradientSums:
    """Sums of the gradients of ``parameters``, of type ``dtype``; ``group`` of each: the ranks that
    hold the same one and see other tokens. ``cut``: what is added up over replicas is cut over
    them. Collective operations run in ``before_backward``'s last pass and in ``finish``."""

    def __init__(
        self,
        parameters: Sequence[tuple[nn.Parameter, dist.ProcessGroup]],
        dtype: torch.dtype,
        *,
        cut: bool = False,
    ) -> None:
        self._parameters = [param for param, _ in parameters]
        self._cut = cut
        self._last = False
        self._next = 0
        self._buckets: list[Bucket] = []
        self._underway: list[dist.Work] = []
        self._places: dict[nn.Parameter, _Place] = {}
        separate = [(p, group) for p, group in parameters if group.size() > 1 or p.dtype != dtype]
        for group, members in _by_group(separate):
            self._lay_out(members, group, dtype)
        for param in self._places:
            param.register_post_accumulate_grad_hook(self._ready)

    def of(self, param: nn.Parameter) -> Tensor | None:
        """The sum, until ``clear``; None where no gradient came. Over replicas after ``finish``:
        where it is cut, of this rank's share only."""
        place = self._places.get(param)
        return param.grad if place is None else place.sum

    def share_of(self, param: nn.Parameter) -> Tensor | None:
        """What of ``of`` this rank updates: all of it, or a flat part, which may be empty."""
        place = self._places.get(param)
        if place is None or not place.bucket.cut:
            return self.of(param)
        begin, end = place.bucket.of_share(param, place.offset)
        return place.bucket.flat[begin:end]

    def buffers(self) -> list[Tensor]:
        """What sums lie in, as long as the run."""
        return [bucket.flat for bucket in self._buckets]

    @property
    def cut_buckets(self) -> list[Bucket]:
        """Those of which each rank updates a share."""
        return [bucket for bucket in self._buckets if bucket.cut]

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
            bucket.waits_for = len(bucket.offsets)

    def _lay_out(
        self,
        members: Sequence[nn.Parameter],
        group: dist.ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        step = ALIGNED_TO // dtype.itemsize
        cut = self._cut and group.size() > 1
        multiple = step * group.size() if cut else step
        plan = _buckets_of(members, step, multiple, BUCKET_BYTES // dtype.itemsize)
        total = sum(size for _, size in plan)
        buffer = torch.zeros(total, dtype=dtype, device=members[0].device)
        start = 0
        for offsets, size in plan:
            bucket = Bucket(buffer[start : start + size], group, offsets, cut, len(offsets))
            for param, at in offsets:
                view = bucket.flat[at : at + param.numel()].view(param.shape)
                self._places[param] = _Place(view, bucket, at)
            self._buckets.append(bucket)
            start += size

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
            work = self._reduce(self._buckets[self._next])
            if work is not None:
                self._underway.append(work)
            self._next += 1

    def _reduce(self, bucket: Bucket) -> dist.Work | None:
        flat, group = bucket.flat, bucket.group
        if group.size() == 1:
            return None
        if bucket.cut and scatters(group):
            return reduce_scatter_into(flat[bucket.share], flat, group=group, async_op=True)
        return dist.all_reduce(flat, group=group, async_op=True)


def scatters(group: dist.ProcessGroup) -> bool:
    """Whether shares are reduced alone: gloo takes twice as long for that as for whole buckets."""
    return dist.get_backend(group) != "gloo"


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


def _buckets_of(
    members: Sequence[nn.Parameter], step: int, multiple: int, full: int
) -> list[tuple[list[tuple[nn.Parameter, int]], int]]:
    """Parameters with their offsets, and the size, of each bucket: elements. Parameters begin at
    multiples of ``step``, sizes are multiples of ``multiple``, a bucket of ``full`` is closed."""
    plan: list[tuple[list[tuple[nn.Parameter, int]], int]] = []
    offsets: list[tuple[nn.Parameter, int]] = []
    end = 0
    for param in members:
        offsets.append((param, end))
        end += -(-param.numel() // step) * step
        if end >= full or param is members[-1]:
            plan.append((offsets, -(-end // multiple) * multiple))
            offsets, end = [], 0
    return plan


def _by_group(
    parameters: Iterable[tuple[nn.Parameter, dist.ProcessGroup]],
) -> list[tuple[dist.ProcessGroup, list[nn.Parameter]]]:
    """The last parameters first."""
    found: dict[int, tuple[dist.ProcessGroup, list[nn.Parameter]]] = {}
    for param, group in reversed(list(parameters)):
        found.setdefault(id(group), (group, []))[1].append(param)
    return list(found.values())
