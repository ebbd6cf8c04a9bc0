"""Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

Shapes: B batch, S sequence, A query heads, K key/value heads, D head width, H hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastllm_planner.arch import ArchSpec
from fastllm_train.models.attention_core import (
    AttentionMask,
    Core,
    attend,
    document_matrix,
    find_documents,
    sight_table,
)
from fastllm_train.models.kernels import TORCH, Angles, Kernels
from fastllm_train.models.norm import build_norm
from fastllm_train.models.projection import Linear, Project, each
from fastllm_train.models.rope import rotation


class Positions(NamedTuple):
    """What attention knows of positions, made once per forward pass.

    ``angles``: the rotations, or None. ``mask``: what layers without a sliding window see,
    ``windowed`` what those with one do.
    """

    angles: Angles | None
    mask: AttentionMask
    windowed: AttentionMask


def positions(
    spec: ArchSpec,
    position_ids: Tensor,
    dtype: torch.dtype,
    context_ranks: int = 1,
    documents: Tensor | None = None,
    *,
    tables: bool = True,
    dense: bool = False,
) -> Positions:
    """For ``position_ids`` int64 [B, S], a rank's part of a sequence cut over ``context_ranks``.

    ``documents``: the whole sequence's position ids where a position 0 begins a document and
    attention stays within it; with ``dense`` as a matrix. ``tables``: the attention core wants
    ``AttentionMask.table``.
    """
    longest, device = position_ids.shape[1] * context_ranks, position_ids.device
    angles = rotation(spec.rope, spec.head_dim, position_ids) if spec.position == "rope" else None
    slopes = None
    if spec.position == "alibi":
        slopes = torch.tensor(alibi_slopes(spec.heads), device=device)
    found = None
    if documents is not None and not dense:
        found = find_documents(documents)
        longest = max(found.lengths)

    def mask(window: int | None) -> AttentionMask:
        if documents is not None and dense:
            return AttentionMask(dense=document_matrix(documents, window))
        made = AttentionMask(window, slopes, found)
        return made._replace(table=sight_table(made, longest, dtype, device)) if tables else made

    plain = mask(None)
    return Positions(
        angles, plain, plain if spec.sliding_window is None else mask(spec.sliding_window)
    )


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head (Press et al. 2021, arXiv:2108.12409): 2^(-8/n), 2^(-16/n), … for n heads.

    For n that is no power of two: the slopes of the power below, then every other slope of the
    power above (the authors' code, and Baichuan's).
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    above = [2.0 ** (-4.0 * (i + 1) / below) for i in range(2 * below)]
    return slopes + above[::2][: heads - below]


class Attention(nn.Module):
    """x [B, S, H] → [B, S, H]. ``recompute_core`` reruns softmax(QKᵀ)V in the backward pass.

    ``first_head`` is the index of this module's first query head: not 0 when heads are sharded.
    """

    def __init__(
        self,
        spec: ArchSpec,
        layer: int,
        *,
        recompute_core: bool = False,
        kernels: Kernels = TORCH,
        core: Core = attend,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.core = core
        self.project: Project = each
        self.head_dim = spec.head_dim
        self.windowed = layer >= spec.full_attention_layers
        self.recompute_core = recompute_core
        self.first_head = 0
        # Typed as modules, here and below: tensor parallelism puts others in their place.
        self.q_proj: nn.Module = Linear(
            spec.hidden, spec.q_size, bias=spec.qkv_bias, kernels=kernels
        )
        self.k_proj: nn.Module = Linear(
            spec.hidden, spec.kv_size, bias=spec.qkv_bias, kernels=kernels
        )
        self.v_proj: nn.Module = Linear(
            spec.hidden, spec.kv_size, bias=spec.qkv_bias, kernels=kernels
        )
        if spec.qk_norm:
            self.q_norm = build_norm(spec, spec.head_dim, kernels)
            self.k_norm = build_norm(spec, spec.head_dim, kernels)
        self.qk_norm = spec.qk_norm
        out_bias = spec.attention_out_bias
        self.o_proj: nn.Module = Linear(spec.q_size, spec.hidden, out_bias, kernels)

    def forward(self, x: Tensor, where: Positions) -> Tensor:
        projected = self.project(x, (self.q_proj, self.k_proj, self.v_proj))
        q_BSAD, k_BSKD, v_BSKD = (self._heads(y) for y in projected)
        if self.qk_norm:
            q_BSAD, k_BSKD = self.q_norm(q_BSAD), self.k_norm(k_BSKD)
        if where.angles is not None:
            q_BSAD = self.kernels.rotate(q_BSAD, where.angles)
            k_BSKD = self.kernels.rotate(k_BSKD, where.angles)
        mask = where.windowed if self.windowed else where.mask
        mask = mask.of_heads(self.first_head, q_BSAD.shape[2])
        if self.recompute_core:
            mixed = checkpoint(self.core, q_BSAD, k_BSKD, v_BSKD, mask, use_reentrant=False)
        else:
            mixed = self.core(q_BSAD, k_BSKD, v_BSKD, mask)
        return self.o_proj(mixed.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads*D] → [B, S, heads, D]; the number of heads follows from the width."""
        return x.unflatten(-1, (-1, self.head_dim))
