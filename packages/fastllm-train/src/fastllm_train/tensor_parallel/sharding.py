"""Which part of each tensor a tensor-parallel rank holds. Pure: no process group, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastllm_planner.arch import ArchSpec, ParamSpec


@dataclass(frozen=True)
class Shard:
    """Rows ``start … start+length`` of dimension ``axis``. ``copies`` ranks in a row hold the same
    shard (key and value heads, when there are fewer of them than ranks)."""

    axis: int
    start: int
    length: int
    copies: int = 1


def shard_of(spec: ArchSpec, param: ParamSpec, tp: int, rank: int) -> Shard | None:
    """The part of rank ``rank`` of ``tp``; None when every rank holds the whole tensor."""
    if param.tp_axis is None:
        return None
    if param.role in ("attention_k", "attention_v") and spec.kv_heads < tp:
        copies = tp // spec.kv_heads
        return Shard(param.tp_axis, rank // copies * spec.head_dim, spec.head_dim, copies)
    length = param.shape[param.tp_axis] // tp
    return Shard(param.tp_axis, rank * length, length)


def shard_shape(spec: ArchSpec, param: ParamSpec, tp: int, rank: int) -> tuple[int, ...]:
    """Shape of the rank's part."""
    shard = shard_of(spec, param, tp, rank)
    if shard is None:
        return param.shape
    return (*param.shape[: shard.axis], shard.length, *param.shape[shard.axis + 1 :])
