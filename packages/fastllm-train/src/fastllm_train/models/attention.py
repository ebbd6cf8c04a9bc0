"""Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

Shapes: B batch, S sequence, A query heads, K key/value heads, D head width, H hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastllm_planner.arch import ArchSpec
from fastllm_train.models.rope import rotate


class Attention(nn.Module):
    """x [B, S, H] → [B, S, H]. ``recompute_core`` reruns softmax(QKᵀ)V in the backward pass."""

    def __init__(self, spec: ArchSpec, *, recompute_core: bool = False) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.recompute_core = recompute_core
        self.q_proj = nn.Linear(spec.hidden, spec.q_size, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(spec.hidden, spec.kv_size, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(spec.hidden, spec.kv_size, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(spec.q_size, spec.hidden, bias=spec.attention_out_bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q_BASD = rotate(self._heads(self.q_proj(x)), *rotation)
        k_BKSD = rotate(self._heads(self.k_proj(x)), *rotation)
        v_BKSD = self._heads(self.v_proj(x))
        if self.recompute_core:
            mixed = checkpoint(_core, q_BASD, k_BKSD, v_BKSD, use_reentrant=False)
        else:
            mixed = _core(q_BASD, k_BKSD, v_BKSD)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads*D] → [B, heads, S, D]; the number of heads follows from the width."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _core(q_BASD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
    grouped = q_BASD.shape[1] != k_BKSD.shape[1]
    return F.scaled_dot_product_attention(
        q_BASD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=grouped
    )
