"""Tensor parallelism over lazy arrays: canonical tensor → one rank's part, and back.

``ParamSpec.tp_axis`` says which axis is split (rows of column-parallel and vocabulary tensors,
columns of row-parallel ones); None means every rank holds a copy. The vocabulary is padded before
it is split.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastllm_convert.arrays import Array, concat
from fastllm_convert.errors import UserError
from fastllm_planner.arch import ArchSpec, ParamSpec


def padded_vocab(vocab: int, multiple: int, tp: int) -> int:
    """Megatron's rule: up to a multiple of ``multiple * tp``."""
    step = multiple * tp
    return -(-vocab // step) * step


def pad_vocab(array: Array, size: int) -> Array:
    """Rows up to ``size``, each a copy of the last: what Megatron's own tools write."""
    extra = size - array.shape[0]
    if extra == 0:
        return array
    rows = array.shape[0]
    return concat([array, array.slice(0, rows - 1, rows).repeat_first(extra)], 0)


def is_vocabulary(param: ParamSpec) -> bool:
    return param.role in ("embedding", "head")


def part(array: Array, axis: int | None, tp: int, rank: int) -> Array:
    """Rank ``rank`` of ``tp``: its slice along ``axis``."""
    if axis is None or tp == 1:
        return array
    size = array.shape[axis]
    if size % tp:
        raise UserError(f"tp={tp} does not divide a tensor of shape {list(array.shape)}")
    return array.slice(axis, rank * (size // tp), (rank + 1) * (size // tp))


def whole(parts: Sequence[Array], axis: int | None) -> Array:
    """The inverse of ``part`` over all ranks (rank 0's copy when ``axis`` is None)."""
    return parts[0] if axis is None else concat(parts, axis)


def check_tp(spec: ArchSpec, tp: int) -> None:
    """Heads, key/value heads and the feed-forward width must divide. ``UserError`` says which."""
    widths = {"heads": spec.heads, "key/value heads": spec.kv_heads}
    if spec.moe is None or spec.moe.first_dense_layers:
        widths["feed-forward width"] = spec.ffn_hidden
    if spec.moe is not None:
        widths["expert width"] = spec.moe.ffn_hidden
    for what, size in widths.items():
        if size % tp:
            fits = [str(n) for n in range(1, size + 1) if size % n == 0 and n <= 64]
            raise UserError(f"tp={tp} does not divide {size} {what}", hint=f"use {', '.join(fits)}")


def layer_ranges(layers: int, pp: int, chunks: int = 1) -> list[list[range]]:
    """``[stage][chunk]`` → global layers. Megatron's interleaving: chunk v of stage p starts at
    ``v * (layers / chunks) + p * (layers / pp / chunks)``."""
    if layers % (pp * chunks):
        what = f"pp={pp}" if chunks == 1 else f"pp={pp} with {chunks} virtual stages"
        raise UserError(f"{what} does not divide {layers} layers")
    size = layers // pp // chunks
    starts = [[v * (layers // chunks) + p * size for v in range(chunks)] for p in range(pp)]
    return [[range(s, s + size) for s in row] for row in starts]
