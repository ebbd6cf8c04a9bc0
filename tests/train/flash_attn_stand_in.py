"""Two functions of flash-attn 2.8 with their published signatures, in plain torch on any device.

What they compute is written from the package's documentation (README, "How to use
FlashAttention"): query i of a sequence sees keys from i + offset - window_size[0] to
i + offset + window_size[1], with offset = seqlen_k - seqlen_q and -1 for no bound; with ``causal``
none after i + offset; -alibi_slope * |i + offset - j| is added to a score.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__version__ = "2.8.3"
calls: list[str] = []  # what was called, with what the tests look at


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    assert not dropout_p
    assert not softcap
    assert not return_attn_probs
    calls.append(f"whole, deterministic={deterministic}")
    return _attention(q, k, v, softmax_scale, causal, window_size, alibi_slopes)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert not dropout_p
    assert not softcap
    assert not return_attn_probs
    assert block_table is None
    for borders, x, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert borders.dtype == torch.int32
        assert borders[0] == 0
        assert borders[-1] == x.shape[0]
        assert borders.diff().max() == longest
    calls.append(f"packed, deterministic={deterministic}")
    mixed = torch.empty_like(q)
    for (a, b), (c, d) in zip(
        cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist(), strict=True
    ):
        one = (q[None, a:b], k[None, c:d], v[None, c:d])
        mixed[a:b] = _attention(*one, softmax_scale, causal, window_size, alibi_slopes)[0]
    return mixed


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: tuple[int, int],
    slopes: Tensor | None,
) -> Tensor:
    """[batch, seqlen, heads, head width] of each; a key head serves neighbouring query heads."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1])
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (scale or 1 / math.sqrt(q.shape[-1]))
    if slopes is not None:
        assert slopes.dtype == torch.float32
        scores = scores - slopes.to(q.dtype)[:, None, None] * (i - j).abs()
    hidden = torch.zeros(i.shape[0], j.shape[0], dtype=torch.bool)
    hidden |= (j > i) if causal else False
    hidden |= (j < i - window[0]) if window[0] >= 0 else False
    hidden |= (j > i + window[1]) if window[1] >= 0 else False
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)
