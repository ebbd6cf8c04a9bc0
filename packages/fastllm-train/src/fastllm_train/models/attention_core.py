"""Softmax(QKᵀ/√D + bias)V over the keys a query sees, without a matrix of all pairs in memory.

``attend`` is torch's; ``fused_attend`` takes the core's kernel where that is made for it;
``FlashAttention`` calls the flash-attn package (Dao 2023, arXiv:2307.08691) where it is installed.

Shapes: B batch, S sequence, A query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm_train.speed import SpeedConfig

# Query rows at once where torch needs a table of what they see. Such a table of a sequence is
# [rows, S], not [S, S]; with fewer rows fewer pairs are computed in vain.
ROWS = 256


class Documents(NamedTuple):
    """Where the documents of a batch lie, its rows one after another: ``borders`` int32 [n + 1],
    from 0 to B*S, on the batch's device; ``lengths``, the same in Python."""

    borders: Tensor
    lengths: tuple[int, ...]


class AttentionMask(NamedTuple):
    """Which keys a query sees, beside causality, and what is added to its scores.

    ``window``: so many keys up to the query itself; None: all. ``slopes``: fp32 [A], ALiBi's
    (-slope * distance is added), or None. ``documents``: attention stays within each; None: a row
    of the batch is one. ``table``: ``sight_table`` for rows as long as the longest document, made
    once for all layers; None: made where it is needed. ``dense``: bool [B, 1, S, S] instead of the
    ``window`` and ``documents``, for compiled layers, whose graph must not know the lengths.
    """

    window: int | None = None
    slopes: Tensor | None = None
    documents: Documents | None = None
    table: Tensor | None = None
    dense: Tensor | None = None

    def of_heads(self, first: int, count: int) -> AttentionMask:
        """The mask of query heads ``first … first+count``."""
        if self.slopes is None or count == self.slopes.shape[0]:
            return self
        table = None if self.table is None else self.table.narrow(1, first, count)
        return self._replace(slopes=self.slopes.narrow(0, first, count), table=table)

    def plain(self, length: int) -> bool:
        """Whether causality is all there is, in documents of up to ``length`` tokens."""
        return self.slopes is None and (self.window is None or self.window >= length)


# (q [B, S, A, D], k [B, S, K, D], v [B, S, K, D], mask) → [B, S, A, D]
Core = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]
# The same where causality is all.
Causal = Callable[[Tensor, Tensor, Tensor], Tensor]


def find_documents(position_ids: Tensor) -> Documents:
    """Of int64 [B, S] positions that restart at 0 with each document. (On a GPU the host waits.)"""
    begins = position_ids == 0
    begins[:, 0] = True
    borders = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=position_ids.numel())
    return Documents(borders.int(), tuple(borders.diff().tolist()))


def document_matrix(position_ids: Tensor, window: int | None) -> Tensor:
    """``AttentionMask.dense``: True where key j is in the document of query i, not after it and
    within ``window``."""
    number = (position_ids == 0).cumsum(dim=1)
    seen = (number[:, :, None] == number[:, None, :]).tril()
    return (seen if window is None else seen.triu(1 - window))[:, None]


def sight_table(
    mask: AttentionMask, length: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What the last rows of a document of ``length`` tokens see; None when ``mask.plain``.

    Row r stands for a query at position p + r, of the R = min(ROWS, length) that begin at some p;
    the last R columns for the keys p … p+R-1, those before them for the keys before p. So the
    table of any block of rows, and of any shorter document, is a part of this one. [1, A, R,
    columns] to be added to the scores, -inf for a key that is not seen; without slopes bool
    [R, columns]. (torch's flash kernel on a CPU takes a mask of two or four dimensions.)
    """
    if mask.plain(length):
        return None
    rows = min(ROWS, length)
    before = (length - 1) // rows * rows
    if mask.window is not None:
        before = min(before, mask.window - 1)
    query = torch.arange(rows, device=device)[:, None]
    key = torch.arange(-before, rows, device=device)
    distance = query - key
    seen = distance >= 0
    if mask.window is not None:
        seen &= distance < mask.window
    if mask.slopes is None:
        return seen
    bias = -mask.slopes[:, None, None] * distance.to(mask.slopes.dtype)
    return bias.masked_fill(~seen, -math.inf).to(dtype)[None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """``Core`` by torch's scaled_dot_product_attention: its flash kernels where causality is all;
    else, with a window or ALiBi, ``ROWS`` queries at a time over the keys they can see. Documents
    one by one. Memory grows with S."""
    return _attend(q, k, v, mask, _causal)


def fused_attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """As ``attend``, on a CPU with the kernel of fastllm_core where causality is all."""
    return _attend(q, k, v, mask, _fused_causal)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, causal: Causal) -> Tensor:
    if mask.dense is not None:
        return _scaled_dot_product(q, k, v, mask.dense)
    longest = q.shape[1] if mask.documents is None else max(mask.documents.lengths)
    table = mask.table
    if table is None:
        table = sight_table(mask, longest, q.dtype, q.device)
    if mask.documents is None:
        return _within(q, k, v, mask, table, causal)
    parts = (x.flatten(0, 1).split(mask.documents.lengths) for x in (q, k, v))
    mixed = [
        _within(q_one[None], k_one[None], v_one[None], mask, table, causal)[0]
        for q_one, k_one, v_one in zip(*parts, strict=True)
    ]
    return torch.cat(mixed).view(q.shape)


def _within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    table: Tensor | None,
    causal: Causal,
) -> Tensor:
    """``attend`` of rows that hold one document each."""
    length = q.shape[1]
    if table is None or mask.plain(length):
        return causal(q, k, v)
    most = table.shape[-2]
    mixed: list[Tensor] = []
    for begin in range(0, length, most):
        end = min(begin + most, length)
        first = 0 if mask.window is None else max(0, begin - mask.window + 1)
        left = table.shape[-1] - most - (begin - first)
        seen = table[..., : end - begin, left : left + end - first]
        mixed.append(_scaled_dot_product(q[:, begin:end], k[:, first:end], v[:, first:end], seen))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _scaled_dot_product(q, k, v, None)


def _fused_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Imported here: the models themselves need no core.
    from fastllm_train.ops.attention import causal_attention, takes_attention

    return causal_attention(q, k, v) if takes_attention(q) else _causal(q, k, v)


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``mask``: bool, or added to the scores, [(B, A,) rows, keys]; None: causal."""
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return mixed.transpose(1, 2)


def flash_takes(q: Tensor) -> bool:
    """Whether flash-attn 2 has a kernel for it: half precision, heads up to 256 wide, from Ampere
    on."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and q.shape[-1] <= 256 and _is_ampere(q.device)


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


class FlashAttention:
    """``Core`` by flash-attn: one call for the batch, whatever the mask; ``attend`` for what it has
    no kernel for (fp32, a CPU). ``deterministic``: the backward pass adds in a fixed order."""

    def __init__(
        self, package: Any, *, deterministic: bool, takes: Callable[[Tensor], bool] = flash_takes
    ) -> None:
        self._whole: Callable[..., Any] = package.flash_attn_func
        self._packed: Callable[..., Any] = package.flash_attn_varlen_func
        self._deterministic = deterministic
        self._takes = takes
        self.name = f"flash-attn {getattr(package, '__version__', '(no version)')}"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        if mask.dense is not None or not self._takes(q):
            return attend(q, k, v, mask)
        options = {
            "causal": True,
            # (keys before the query, keys after it), itself counted apart; -1: all of them.
            "window_size": (-1, -1) if mask.window is None else (mask.window - 1, 0),
            "alibi_slopes": mask.slopes,
            "deterministic": self._deterministic,
        }
        if mask.documents is None:
            return self._whole(q, k, v, **options)
        borders, lengths = mask.documents
        longest = max(lengths)
        flat = (x.flatten(0, 1) for x in (q, k, v))
        mixed = self._packed(*flat, borders, borders, longest, longest, **options)
        return mixed.view(q.shape)


def find_flash_attention(*, deterministic: bool) -> FlashAttention | None:
    """The installed flash-attn, if it is one whose functions take what is passed (2.4.1 and
    later)."""
    try:
        package = importlib.import_module("flash_attn")
        taken = inspect.signature(package.flash_attn_varlen_func).parameters
    except (ImportError, AttributeError):
        return None
    if not {"window_size", "alibi_slopes", "deterministic"} <= taken.keys():
        return None
    return FlashAttention(package, deterministic=deterministic)


def attention_core(speed: SpeedConfig) -> Core:
    """What ``[speed]`` asks for: "auto" takes flash-attn where it is installed, else
    ``fused_attend`` if the other operators are fused too."""
    if speed.attention == "sdpa":
        return attend
    found = find_flash_attention(deterministic=speed.deterministic)
    if found is not None:
        return found
    return fused_attend if speed.kernels == "fused" else attend


def name_of_core(core: Core) -> str:
    """For the log."""
    return core.name if isinstance(core, FlashAttention) else "torch's scaled_dot_product_attention"
