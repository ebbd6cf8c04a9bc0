"""Master weights and moments cut over replicas, ZeRO-1 (Rajbhandari et al. 2020, arXiv:1910.02054,
section 5.1).

The model's weights lie in flat buffers, one for each bucket of their gradients and laid out like it
(``gradient_sums``). A rank keeps masters and moments of its share of each, updates that, and takes
the others' from them: a bucket's weights are gathered while the next one's are updated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm_train.collectives import all_gather_into
from fastllm_train.gradient_sums import Bucket, GradientSums
from fastllm_train.master_weights import MasterWeights, write_weight
from fastllm_train.optimizer import MOMENTS, OptimConfig, decays

T = TypeVar("T")


@dataclass(frozen=True)
class _Piece:
    """Elements [begin, end) of a flattened parameter, which this rank updates; they begin at ``at``
    in their bucket. ``held``: a view of the model's weight."""

    begin: int
    end: int
    at: int
    held: nn.Parameter


class ShardedWeights:
    """``States`` (engine_state) of ``parameters``, cut as ``sums`` are cut; whole where they are
    not. The parameters' memory moves into flat buffers."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        sums: GradientSums,
        config: OptimConfig,
        *,
        split: bool,
    ) -> None:
        self._shards = [Shard(bucket, config, split=split) for bucket in sums.cut_buckets]
        self._shard_of = {param: shard for shard in self._shards for param in shard.parameters}
        whole = [p for p in parameters if p not in self._shard_of]
        self._whole = MasterWeights(whole, config, split=split)
        self._moments, self._split = MOMENTS[config.name], split

    @property
    def steps(self) -> int:
        return self._whole.steps

    def update(
        self,
        gradient: Callable[[nn.Parameter], Tensor | None],
        lr: float,
        grad_scale: Tensor | None,
    ) -> None:
        """As ``MasterWeights.update``; ``gradient`` is asked of parameters that are not cut.
        Collective."""
        underway = [shard.update(lr, grad_scale) for shard in self._shards]
        self._whole.update(gradient, lr, grad_scale)
        for work in underway:
            work.wait()

    def visit(
        self, parameters: Iterable[tuple[T, nn.Parameter]], *, write: bool = False
    ) -> Iterator[tuple[T, nn.Parameter]]:
        """In their order: all states are in memory."""
        del write
        return iter(parameters)

    def weight(self, param: nn.Parameter) -> Tensor:
        shard = self._shard_of.get(param)
        if shard is None:
            return self._whole.weight(param)
        if param.dtype == torch.float32:  # its own master, and whole
            return param.detach()
        return shard.gathered(param, shard.masters.weight)

    def moments(self, param: nn.Parameter) -> dict[str, Tensor]:
        shard = self._shard_of.get(param)
        if shard is None:
            return self._whole.moments(param)
        of = shard.masters.moments
        return {key: shard.gathered(param, lambda p, k=key: of(p)[k]) for key in self._moments}

    def link(self) -> None:
        """Nothing: moments are there from the start."""

    def begin_restore(self, optimizer_steps: int) -> None:
        for part in (*(shard.masters for shard in self._shards), self._whole):
            part.begin_restore(optimizer_steps)

    def restore(self, param: nn.Parameter, weight: Tensor, moments: Mapping[str, Tensor]) -> None:
        shard = self._shard_of.get(param)
        if shard is None:
            self._whole.restore(param, weight, moments)
            return
        write_weight(weight, param.detach(), split=self._split)  # the other ranks' pieces, too
        for piece in shard.pieces[param]:
            part = slice(piece.begin, piece.end)
            cut = {key: value.flatten()[part] for key, value in moments.items()}
            shard.masters.restore(piece.held, weight.flatten()[part], cut)


class Shard:
    """This rank's share of one bucket: ``pieces`` of each parameter (one, or none), and their
    ``masters``."""

    def __init__(self, bucket: Bucket, config: OptimConfig, *, split: bool) -> None:
        self.parameters = [param for param, _ in bucket.offsets]
        self._bucket = bucket
        first = self.parameters[0]
        self._weights = torch.zeros(bucket.flat.numel(), dtype=first.dtype, device=first.device)
        self.pieces = {param: self._move(param, offset) for param, offset in bucket.offsets}
        held = [(piece, param) for param, own in self.pieces.items() for piece in own]
        decayed = [decays(tuple(param.shape)) for _, param in held]
        own = [piece.held for piece, _ in held]
        self.masters = MasterWeights(own, config, split=split, decayed=decayed)
        self._gradients = {p.held: bucket.flat[p.at : p.at + p.held.numel()] for p, _ in held}

    def update(self, lr: float, grad_scale: Tensor | None) -> dist.Work:
        """One step of the share; starts to ``gather``. Collective."""
        self.masters.update(self._gradients.get, lr, grad_scale)
        return self.gather()

    def gather(self) -> dist.Work:
        """Every rank's share of the bucket's weights, to all. Collective."""
        own = self._weights[self._bucket.share]
        work = all_gather_into(self._weights, own, group=self._bucket.group, async_op=True)
        assert work is not None
        return work

    def gathered(self, param: nn.Parameter, held: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """``held`` of this rank's pieces of ``param`` and the other ranks', fp32, whole.
        Collective."""
        # Every element is one rank's; as integers, zeros of the others change no bit of it.
        whole = torch.zeros(param.numel(), dtype=torch.int32, device=param.device)
        for piece in self.pieces[param]:
            whole[piece.begin : piece.end] = held(piece.held).reshape(-1).view(torch.int32)
        dist.all_reduce(whole, group=self._bucket.group)
        return whole.view(torch.float32).view(param.shape)

    def _move(self, param: nn.Parameter, offset: int) -> tuple[_Piece, ...]:
        """The parameter's memory goes into the flat buffer."""
        view = self._weights[offset : offset + param.numel()].view(param.shape)
        view.copy_(param.detach())
        param.data = view
        begin, end = self._bucket.of_share(param, offset)
        if begin == end:
            return ()
        held = nn.Parameter(self._weights[begin:end], requires_grad=False)
        return (_Piece(begin - offset, end - offset, begin, held),)
