"""Context parallelism: ranks hold consecutive parts of a sequence.

Attention exchanges positions for heads, so that each rank attends over the whole sequence with some
of the heads (DeepSpeed-Ulysses: Jacobs et al. 2023, arXiv:2309.14509).
"""

from __future__ import annotations

import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastllm_train.collectives import exchange_dimensions, gather_sequence, mean_of_summed
from fastllm_train.mesh import Mesh
from fastllm_train.models.attention_core import AttentionMask, Core
from fastllm_train.models.decoder import Block, Trunk
from fastllm_train.models.mlp import MixtureOfExperts

SEQUENCE, HEADS = 1, 2


def cut_context(trunk: Trunk, mesh: Mesh) -> None:
    """Put the exchange around every layer's attention."""
    group = mesh.cp_group
    trunk.context_ranks = group.size()
    trunk.whole_positions = lambda ids: gather_sequence(ids, group)
    for block in trunk.layers.values():
        assert isinstance(block, Block)
        block.self_attn.core = HeadExchange(block.self_attn.core, group)
        if isinstance(block.mlp, MixtureOfExperts):
            within = block.mlp.mean_over_ranks
            block.mlp.mean_over_ranks = lambda x, within=within: mean_of_summed(within(x), group)


def part_of_sequence(array: NDArray, mesh: Mesh) -> NDArray:  # type: ignore[type-arg]
    """This rank's columns of [micro, S]."""
    length = array.shape[1] // mesh.parallel.cp
    return array[:, mesh.at.cp * length : (mesh.at.cp + 1) * length]


class HeadExchange:
    """``Core`` over parts of a sequence."""

    def __init__(self, inner: Core, group: dist.ProcessGroup) -> None:
        self._inner, self._group = inner, group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        ranks = self._group.size()
        if k.shape[HEADS] < ranks:  # each rank needs a whole key head: the one of its queries
            copies = ranks // k.shape[HEADS]
            k, v = (x.repeat_interleave(copies, dim=HEADS) for x in (k, v))
        q, k, v = (exchange_dimensions(x, HEADS, SEQUENCE, self._group) for x in (q, k, v))
        heads = q.shape[HEADS]
        mask = mask.of_heads(self._group.rank() * heads, heads)
        return exchange_dimensions(self._inner(q, k, v, mask), SEQUENCE, HEADS, self._group)
