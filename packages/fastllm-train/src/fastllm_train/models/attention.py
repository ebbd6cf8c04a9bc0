"""Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

Shapes: B batch, S sequence, A query heads, K key/value heads, D head width, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastllm_planner.arch import ArchSpec
from fastllm_train.models.kernels import TORCH, Angles, Kernels
from fastllm_train.models.norm import build_norm
from fastllm_train.models.rope import rotation


class Positions(NamedTuple):
    """What attention knows of positions, made once per forward pass.

    ``angles``: the rotations, or None. ``visible``: bool, True where a query (row) sees a key,
    [B, 1, S, S] where documents are apart, or None where causality is all; ``window``: the same
    for layers with a sliding window, [S, S] without documents. ``alibi``: additive [A, S, S] with
    the causal mask in it, or None.
    """

    angles: Angles | None
    visible: Tensor | None
    window: Tensor | None
    alibi: Tensor | None


def positions(
    spec: ArchSpec,
    position_ids: Tensor,
    dtype: torch.dtype,
    context_ranks: int = 1,
    documents: Tensor | None = None,
) -> Positions:
    """For ``position_ids`` int64 [B, S], a rank's part of a sequence cut over ``context_ranks``.

    ``documents``: the whole sequence's position ids where a position 0 begins a document and
    attention stays within it.
    """
    length, device = position_ids.shape[1] * context_ranks, position_ids.device
    angles = rotation(spec.rope, spec.head_dim, position_ids) if spec.position == "rope" else None
    window = None
    if spec.sliding_window is not None and spec.sliding_window < length:
        window = sliding_window(length, spec.sliding_window, device)
    visible = None
    if documents is not None:
        visible = same_document(documents)
        window = None if window is None else visible & window
    alibi = alibi_bias(spec.heads, length, device).to(dtype) if spec.position == "alibi" else None
    return Positions(angles, visible, visible if window is None else window, alibi)


def same_document(position_ids: Tensor) -> Tensor:
    """True where key j is in the document of query i and not after it: bool [B, 1, S, S]."""
    number = (position_ids == 0).cumsum(dim=1)
    same = number[:, :, None] == number[:, None, :]
    return same.tril()[:, None]


def sliding_window(length: int, window: int, device: torch.device) -> Tensor:
    """True where key j is one of the last ``window`` up to query i (arXiv:2310.06825, 2.1)."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)


def alibi_slopes(heads: int) -> list[float]:
    """One slope per head (Press et al. 2021, arXiv:2108.12409): 2^(-8/n), 2^(-16/n), … for n heads.

    For n that is no power of two: the slopes of the power below, then every other slope of the
    power above (the authors' code, and Baichuan's).
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
    above = [2.0 ** (-4.0 * (i + 1) / below) for i in range(2 * below)]
    return slopes + above[::2][: heads - below]


def alibi_bias(heads: int, length: int, device: torch.device) -> Tensor:
    """slope * (j - i) for keys j up to query i, -inf after it: fp32 [A, S, S]."""
    place = torch.arange(length, device=device)
    distance = (place[None, :] - place[:, None]).float()
    slopes = torch.tensor(alibi_slopes(heads), device=device)
    return (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)


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
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.core: Core = attend
        self.head_dim = spec.head_dim
        self.windowed = layer >= spec.full_attention_layers
        self.recompute_core = recompute_core
        self.first_head = 0
        # Typed as modules, here and below: tensor parallelism puts others in their place.
        self.q_proj: nn.Module = nn.Linear(spec.hidden, spec.q_size, bias=spec.qkv_bias)
        self.k_proj: nn.Module = nn.Linear(spec.hidden, spec.kv_size, bias=spec.qkv_bias)
        self.v_proj: nn.Module = nn.Linear(spec.hidden, spec.kv_size, bias=spec.qkv_bias)
        if spec.qk_norm:
            self.q_norm = build_norm(spec, spec.head_dim, kernels)
            self.k_norm = build_norm(spec, spec.head_dim, kernels)
        self.qk_norm = spec.qk_norm
        out_bias = spec.attention_out_bias
        self.o_proj: nn.Module = nn.Linear(spec.q_size, spec.hidden, bias=out_bias)

    def forward(self, x: Tensor, where: Positions) -> Tensor:
        q_BSAD = self._heads(self.q_proj(x))
        k_BSKD = self._heads(self.k_proj(x))
        v_BSKD = self._heads(self.v_proj(x))
        if self.qk_norm:
            q_BSAD, k_BSKD = self.q_norm(q_BSAD), self.k_norm(k_BSKD)
        if where.angles is not None:
            q_BSAD = self.kernels.rotate(q_BSAD, where.angles)
            k_BSKD = self.kernels.rotate(k_BSKD, where.angles)
        mask = where.window if self.windowed else where.visible
        if where.alibi is not None:
            mask = where.alibi[self.first_head : self.first_head + q_BSAD.shape[2]]
        if self.recompute_core:
            mixed = checkpoint(self.core, q_BSAD, k_BSKD, v_BSKD, mask, use_reentrant=False)
        else:
            mixed = self.core(q_BSAD, k_BSKD, v_BSKD, mask)
        return self.o_proj(mixed.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads*D] → [B, S, heads, D]; the number of heads follows from the width."""
        return x.unflatten(-1, (-1, self.head_dim))


# (q [B, S, A, D], k [B, S, K, D], v [B, S, K, D], mask) → [B, S, A, D]
Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(q_BSAD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, mask: Tensor | None) -> Tensor:
    """Causal softmax(QKᵀ/√D)V. ``mask`` (boolean, or added to the scores), if given, is causal."""
    mixed = F.scaled_dot_product_attention(
        q_BSAD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q_BSAD.shape[2] != k_BSKD.shape[2],
    )
    return mixed.transpose(1, 2)
