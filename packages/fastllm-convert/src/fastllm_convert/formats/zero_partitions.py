"""fp32 masters out of ZeRO's flat partitions.

Stage 1 and 2: the parameters of an optimizer group are laid end to end, padded, and cut into one
equal part per rank; a parameter may straddle ranks. Stage 3: every parameter is cut over the ranks
by itself (ceil(numel / ranks) each, the last padded); a rank keeps its slices end to end, in
sub-groups that ignore parameter boundaries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastllm_convert.arrays import Array, concat
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_globals import Call


@dataclass(frozen=True)
class Flat:
    """``tensors``: name → fp32 array in its own shape, aliases of shared parameters included."""

    tensors: dict[str, Array]
    stage: int


Shapes = dict[str, tuple[int, ...]]


def masters(
    model: Sequence[Mapping[str, Any]], optim: Sequence[Mapping[str, Any]], where: Path
) -> Flat:
    """``model``: the model-state files (one, or one a rank); ``optim``: shards in rank order."""
    if not optim:
        return _unpartitioned(model[0], where)
    states = [_optimizer_state(o, where) for o in optim]
    stages = {_stage(s) for s in states}
    if len(stages) != 1 or not stages <= {1, 2, 3}:
        raise UserError(f"{where}: optimizer states of ZeRO stages {sorted(stages)}")
    stage = stages.pop()
    groups = _param_shapes(model[0], where)
    if stage == 3:
        tensors = _stage3(groups, states, where)
        tensors |= _frozen_partitioned(model, len(states), where)
    else:
        tensors = _stage12(groups, states, where)
        tensors |= _frozen_whole(model[0], where)
    _add_aliases(model[0], tensors, where)
    return Flat(tensors, stage)


def _optimizer_state(entries: Mapping[str, Any], where: Path) -> dict[str, Any]:
    state = entries.get("optimizer_state_dict")
    if not isinstance(state, dict):
        raise UserError(f"{where}: an optimizer file has no optimizer_state_dict")
    return cast("dict[str, Any]", state)


def _stage(state: Mapping[str, Any]) -> int:
    """ZeroStageEnum pickles as a call with its value; old files hold a plain integer."""
    stage = state.get("zero_stage")
    if isinstance(stage, Call) and len(stage.args) == 1:
        stage = stage.args[0]
    return stage if isinstance(stage, int) else -1


def _shape(value: Any, name: str, where: Path) -> tuple[int, ...]:
    if isinstance(value, tuple):
        items = cast("tuple[Any, ...]", value)
        if all(type(v) is int and v >= 0 for v in items):
            return items
    raise UserError(f"{where}: the shape of {name!r} is not a shape")


def _shapes_of(value: Any, where: Path) -> Shapes:
    if not isinstance(value, dict):
        raise UserError(f"{where}: param_shapes is damaged")
    items = cast("dict[str, Any]", value).items()
    return {str(n).removeprefix("module."): _shape(s, str(n), where) for n, s in items}


def _param_shapes(model: Mapping[str, Any], where: Path) -> list[Shapes]:
    found: object = model.get("param_shapes")
    if isinstance(found, dict):
        found = [cast("object", found)]
    if not isinstance(found, list):
        raise UserError(
            f"{where}: no param_shapes, so the flat masters cannot be told apart",
            hint="use --weights model",
        )
    return [_shapes_of(group, where) for group in cast("list[Any]", found)]


def _flat_list(value: Any, what: str, where: Path) -> list[Array]:
    items = cast("list[Any]", value) if isinstance(value, list) else [value]
    arrays = [a for a in items if isinstance(a, Array)]
    if len(arrays) != len(items):
        raise UserError(f"{where}: {what} is not a list of tensors")
    return [a if len(a.shape) == 1 else a.reshape(a.numel) for a in arrays]


def _stage12(
    groups: Sequence[Shapes], states: Sequence[Mapping[str, Any]], where: Path
) -> dict[str, Array]:
    key = "single_partition_of_fp32_groups"
    per_rank = [_flat_list(s.get(key), key, where) for s in states]
    if any(len(parts) != len(groups) for parts in per_rank):
        raise UserError(f"{where}: {len(groups)} parameter groups, another number of partitions")
    found: dict[str, Array] = {}
    for index, shapes in enumerate(groups):
        flat = _join([parts[index] for parts in per_rank], where)
        pads = _alignment(states[0], index, len(shapes), where)
        at = 0
        for (name, shape), pad in zip(shapes.items(), pads, strict=True):
            size = math.prod(shape)
            found[name] = _take(flat, at, shape, name, where)
            at += size + pad
        # DeepSpeed pads a group to a multiple of 2 * ranks elements (NCCL alignment).
        if not at <= flat.numel < at + max(2 * len(states), 1) + sum(pads):
            raise UserError(
                f"{where}: group {index} holds {flat.numel:,} elements, its parameters {at:,}"
            )
    return found


def _join(parts: Sequence[Array], where: Path) -> Array:
    try:
        return concat(parts, 0)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _take(flat: Array, at: int, shape: tuple[int, ...], name: str, where: Path) -> Array:
    size = math.prod(shape)
    if at + size > flat.numel:
        raise UserError(
            f"{where}: {name!r} needs elements up to {at + size:,}, "
            f"the partitions hold {flat.numel:,}",
            hint="a shard is missing or belongs to another run",
        )
    return flat.slice(0, at, at + size).reshape(*shape)


def _alignment(state: Mapping[str, Any], group: int, count: int, where: Path) -> list[int]:
    """``param_alignment_paddings`` (DeepSpeed 0.19): elements after each parameter of a group."""
    pads = state.get("param_alignment_paddings")
    if pads is None:
        return [0] * count
    try:
        found = [int(p) for p in pads[group]]
    except (TypeError, ValueError, IndexError, KeyError):
        found = []
    if len(found) != count or any(p < 0 for p in found):
        raise UserError(f"{where}: param_alignment_paddings is damaged")
    return found


def _stage3(
    groups: Sequence[Shapes], states: Sequence[Mapping[str, Any]], where: Path
) -> dict[str, Array]:
    key = "fp32_flat_groups"
    ranks = [_join(_flat_list(s.get(key), key, where), where) for s in states]
    world = len(ranks)
    found: dict[str, Array] = {}
    at = 0
    for shapes in groups:
        for name, shape in shapes.items():
            size = math.prod(shape)
            own = -(-size // world)
            if any(at + own > r.numel for r in ranks):
                raise UserError(
                    f"{where}: {name!r} needs elements up to {at + own:,} of every rank, one holds "
                    f"{min(r.numel for r in ranks):,}",
                    hint="a shard is missing or belongs to another run",
                )
            whole = concat([r.slice(0, at, at + own) for r in ranks], 0)
            found[name] = whole.slice(0, 0, size).reshape(*shape)
            at += own
    if any(r.numel - at not in range(0, 2 * world + 1) for r in ranks):
        raise UserError(
            f"{where}: the ranks hold {max(r.numel for r in ranks):,} elements, "
            f"the parameters {at:,}"
        )
    return found


def _frozen(model: Mapping[str, Any], where: Path) -> tuple[Shapes, dict[str, Array]]:
    shapes, parts = model.get("frozen_param_shapes"), model.get("frozen_param_fragments")
    if not shapes:
        return {}, {}
    if not isinstance(parts, dict):
        raise UserError(f"{where}: frozen parameters without their values")
    items = cast("dict[str, Any]", parts).items()
    arrays = {str(n).removeprefix("module."): a for n, a in items if isinstance(a, Array)}
    return _shapes_of(shapes, where), arrays


def _frozen_whole(model: Mapping[str, Any], where: Path) -> dict[str, Array]:
    shapes, arrays = _frozen(model, where)
    found: dict[str, Array] = {}
    for name, shape in shapes.items():
        array = arrays.get(name)
        if array is None or array.numel != math.prod(shape):
            raise UserError(f"{where}: frozen parameter {name!r} is missing or misshapen")
        found[name] = array.reshape(*shape)
    return found


def _frozen_partitioned(
    model: Sequence[Mapping[str, Any]], world: int, where: Path
) -> dict[str, Array]:
    per_rank = [_frozen(m, where) for m in model]
    shapes = per_rank[0][0]
    if shapes and len(per_rank) != world:
        raise UserError(f"{where}: frozen parameters of {len(per_rank)} of {world} ranks")
    found: dict[str, Array] = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        own = -(-size // world)
        parts = [arrays.get(name) for _, arrays in per_rank]
        if any(p is None or p.numel != own for p in parts):
            raise UserError(f"{where}: frozen parameter {name!r} is missing or misshapen")
        flat = _join([p.reshape(own) for p in parts if p is not None], where)
        found[name] = flat.slice(0, 0, size).reshape(*shape)
    return found


def _add_aliases(model: Mapping[str, Any], tensors: dict[str, Array], where: Path) -> None:
    """``shared_params``: alias → owner (a list of pairs in old files)."""
    shared: object = model.get("shared_params") or {}
    pairs: Any = cast("dict[Any, Any]", shared).items() if isinstance(shared, dict) else shared
    for alias, owner in cast("list[tuple[Any, Any]]", pairs):
        alias, owner = (str(n).removeprefix("module.") for n in (alias, owner))
        if owner in tensors:
            tensors[alias] = tensors[owner]
        elif alias not in tensors:
            raise UserError(f"{where}: {alias!r} shares {owner!r}, which is not there")


def _unpartitioned(model: Mapping[str, Any], where: Path) -> Flat:
    """ZeRO-0: masters, if any, lie in the model file as one list per optimizer group."""
    optimizer = model.get("optimizer")
    groups: Any = None
    if isinstance(optimizer, dict):
        groups = cast("dict[str, Any]", optimizer).get("fp32_groups")
    module: Any = model.get("module")
    if not isinstance(module, dict):
        raise UserError(f"{where}: no module weights")
    named = {str(k).removeprefix("module."): v for k, v in cast("dict[str, Any]", module).items()}
    if groups is None:
        if all(isinstance(a, Array) and a.dtype.code == "F32" for a in named.values()):
            return Flat(named, 0)  # trained in fp32: the weights are their own masters
        raise UserError(f"{where}: no fp32 masters found", hint="use --weights model")
    flat = [a for group in groups for a in _flat_list(group, "fp32_groups", where)]
    if not isinstance(groups, list) or len(cast("list[Any]", groups)) != 1:
        raise UserError(
            f"{where}: masters of several groups without names", hint="use --weights model"
        )
    unique = _without_aliases(model, named)
    if [math.prod(a.shape) for a in unique.values()] != [a.numel for a in flat]:
        raise UserError(f"{where}: the masters do not line up with the weights")
    found = {
        n: master.reshape(*a.shape) for (n, a), master in zip(unique.items(), flat, strict=True)
    }
    _add_aliases(model, found, where)
    return Flat(found, 0)


def _without_aliases(model: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Array]:
    shared: Any = model.get("shared_params") or {}
    buffers: Any = model.get("buffer_names") or []
    skip = {str(n).removeprefix("module.") for n in [*shared, *buffers]}
    return {n: a for n, a in named.items() if n not in skip and isinstance(a, Array)}
