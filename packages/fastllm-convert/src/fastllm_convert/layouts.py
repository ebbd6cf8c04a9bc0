"""How a format stores canonical tensors: as they are, stacked, transposed, permuted, interleaved.

A ``Layout`` is a pair of inverse functions. ``join`` makes the format's tensor from the canonical
ones, ``split`` takes it apart again; both rearrange boxes of lazy arrays and move no bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from fastllm_convert.arrays import Array, concat


@dataclass(frozen=True, slots=True)
class Layout:
    """``kind`` is for people and tests; ``join`` and ``split`` are each other's inverse."""

    kind: str
    join: Callable[[Sequence[Array]], Array]
    split: Callable[[Array], list[Array]]


class Row(NamedTuple):
    """One tensor of a format: its name there, the canonical tensors it holds, and how."""

    name: str
    canonical: tuple[str, ...]
    how: Layout


def copy() -> Layout:
    """One canonical tensor, unchanged."""
    return Layout("copy", lambda parts: parts[0], lambda whole: [whole])


def stack(sizes: Sequence[int]) -> Layout:
    """Parts on top of each other along axis 0 (``sizes`` rows each): W_pack, gate and up."""
    rows = tuple(sizes)

    def split(whole: Array) -> list[Array]:
        found: list[Array] = []
        at = 0
        for count in rows:
            found.append(whole.slice(0, at, at + count))
            at += count
        if at != whole.shape[0]:
            raise ValueError(f"{whole.shape[0]} rows, not {' + '.join(map(str, rows))}")
        return found

    return Layout("stack", lambda parts: concat(parts, 0), split)


def transposed(inner: Layout) -> Layout:
    """``inner``, stored ``[in, out]`` (GPT-2's Conv1D)."""
    return Layout(
        f"transposed {inner.kind}",
        lambda parts: inner.join(parts).transpose(1, 0),
        lambda whole: inner.split(whole.transpose(1, 0)),
    )


def rotary_pairs(heads: int) -> Layout:
    """Meta's row order of q and k: rotary pairs (2i, 2i+1) where Hugging Face rotates (i, i + d/2).

    Canonical rows of a head are ``[half, d/2]``; Meta's are ``[d/2, half]``. Bias vectors likewise.
    """

    def swap(array: Array, outer: int) -> Array:
        rows, rest = array.shape[0], array.shape[1:]
        inner = rows // heads // outer
        cut = array.split_axis(0, heads, rows // heads).split_axis(1, outer, inner)
        axes = (0, 2, 1, *range(3, 3 + len(rest)))
        return cut.transpose(*axes).merge_axes(1).merge_axes(0)

    def join(parts: Sequence[Array]) -> Array:
        return swap(parts[0], 2)

    def split(whole: Array) -> list[Array]:
        if whole.shape[0] % (2 * heads):
            raise ValueError(f"{whole.shape[0]} rows are not {heads} heads of an even size")
        return [swap(whole, whole.shape[0] // heads // 2)]

    return Layout("rotary pairs", join, split)


def grouped_qkv(groups: int, queries: int, head_dim: int) -> Layout:
    """Megatron's fused q, k, v (checkpoint_version ≥ 2): per key/value group, its ``queries`` query
    heads, then its key head, then its value head."""

    def join(parts: Sequence[Array]) -> Array:
        q, k, v = parts
        pieces = [
            q.split_axis(0, groups, queries * head_dim),
            k.split_axis(0, groups, head_dim),
            v.split_axis(0, groups, head_dim),
        ]
        return concat(pieces, 1).merge_axes(0)

    def split(whole: Array) -> list[Array]:
        per_group = whole.split_axis(0, groups, (queries + 2) * head_dim)
        edges = (0, queries * head_dim, (queries + 1) * head_dim, (queries + 2) * head_dim)
        cuts = pairwise(edges)
        return [per_group.slice(1, a, b).merge_axes(0) for a, b in cuts]

    return Layout("grouped qkv", join, split)


def to_format(rows: Sequence[Row], canonical: Mapping[str, Array]) -> dict[str, Array]:
    """Canonical tensors → the format's, in table order. All names must be there."""
    return {row.name: row.how.join([canonical[n] for n in row.canonical]) for row in rows}


def to_canonical(rows: Sequence[Row], tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The format's tensors → canonical ones. ``ValueError`` names a tensor of impossible shape."""
    found: dict[str, Array] = {}
    for row in rows:
        try:
            parts = row.how.split(tensors[row.name])
        except (ValueError, IndexError) as error:
            shape = list(tensors[row.name].shape)
            raise ValueError(f"{row.name!r} of shape {shape}: {error}") from None
        found.update(zip(row.canonical, parts, strict=True))
    return found
