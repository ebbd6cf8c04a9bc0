"""DeepSpeed checkpoints of plain modules: ZeRO 0, 1, 2 and 3; fastllm-train's tensor parallelism
and pipeline stages. (``megatron_deepspeed`` reads the layer files of DeepSpeed's own pipeline.)

``<root>/latest`` names ``<root>/global_stepN``. Model weights lie in ``mp_rank_00_model_states.pt``
(stage 3: one file per rank, its tensors empty); fp32 masters, as flat partitions, in
``*zero_pp_rank_R_mp_rank_00_optim_states.pt``. Layout rules: ``docs/convert.md``; every shape and
count is checked against what the files say of themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import (
    Checkpoint,
    Companions,
    check_names,
    members_of,
)
from fastllm_convert.dtypes import DType
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_zip import TorchFile, read_torch
from fastllm_convert.formats import hf
from fastllm_convert.formats.companions import find_config
from fastllm_convert.formats.zero_partitions import Flat, masters
from fastllm_convert.sharding import whole
from fastllm_planner.arch import ArchSpec, iter_params

Weights = Literal["model", "master"]

_MODEL = re.compile(r"^(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt$")
_OPTIM = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt$")
_LAYER = re.compile(r"^layer_\d+-model_\d+-model_states\.pt$")


def tag_folder(path: Path) -> Path | None:
    """The ``global_stepN`` folder that ``path`` is or points to; None when it is neither."""
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_bytes()[:256].decode("utf-8", "replace").strip()
        if not tag or "/" in tag or "\\" in tag or tag in (".", ".."):
            raise UserError(f"{latest} names {tag!r}: not a folder beside it")
        if not (path / tag).is_dir():
            raise UserError(f"{latest} names {tag}, which is not there")
        return path / tag
    return path if any(_MODEL.match(p.name) for p in path.glob("*.pt")) else None


def optimizer_files(folder: Path, mp: int) -> list[Path]:
    """Optimizer shards of model-parallel rank ``mp``, in data-parallel order."""
    found = {
        int(m[1]): p for p in folder.glob("*.pt") if (m := _OPTIM.match(p.name)) and int(m[2]) == mp
    }
    absent = [r for r in range(max(found, default=-1) + 1) if r not in found]
    if absent:
        raise UserError(f"{folder}: no optimizer states of data-parallel rank {absent[0]}")
    return [found[r] for r in range(len(found))]


def recognises(path: Path) -> bool:
    """A DeepSpeed checkpoint without pipeline layer files."""
    folder = tag_folder(path)
    return (
        folder is not None
        and any(_MODEL.match(p.name) for p in folder.glob("*.pt"))
        and not any(_LAYER.match(p.name) for p in folder.glob("*.pt"))
    )


@dataclass(frozen=True)
class _Files:
    folder: Path
    model: dict[int, Path]  # by data-parallel rank; stages 0-2 have rank 0 alone
    optim: dict[int, Path]
    per_rank: bool


def _list_files(folder: Path) -> list[_Files]:
    """The files of every model-parallel rank."""
    ranks: dict[int, _Files] = {}
    for file in sorted(folder.glob("*.pt")):
        found, kind = _MODEL.match(file.name), "model"
        if found is None:
            found, kind = _OPTIM.match(file.name), "optim"
        if found is None:
            continue
        rank, shard = found.groups()
        files = ranks.setdefault(int(shard), _Files(folder, {}, {}, per_rank=False))
        if kind == "model" and rank is not None:
            files = ranks[int(shard)] = replace(files, per_rank=True)
        (files.model if kind == "model" else files.optim)[int(rank or 0)] = file
    for shard in range(max(ranks) + 1):
        files = ranks.get(shard)
        if files is None or not files.model:
            raise UserError(f"{folder}: no model states of model-parallel rank {shard}")
        for what, held in (("model", files.model), ("optimizer", files.optim)):
            absent = [r for r in range(max(held, default=-1) + 1) if r not in held]
            if absent:
                raise UserError(f"{folder}: no {what} states of data-parallel rank {absent[0]}")
    return [ranks[shard] for shard in range(len(ranks))]


@dataclass(frozen=True)
class _Rank:
    """What one model-parallel rank holds."""

    tensors: dict[str, Array]
    used: list[TorchFile]
    masters: bool
    stage: int | None
    trained_in: DType | None


def _read_rank(files: _Files, weights: Weights, size: int) -> _Rank:
    first = read_torch(files.model[0])
    state = first.entries
    module = module_tensors(state, files.model[0])
    _check_world(state, files, size)
    empty = files.per_rank and all(a.numel == 0 for a in module.values())
    if weights == "model" and not empty:
        return _Rank(module, [first], masters=False, stage=None, trained_in=None)
    used = [first]
    flat, optim_files = _read_masters(files, first, used)
    tensors = {**flat.tensors, **_buffers(state, module)}
    rounded = training_type(module) if weights == "model" else None
    return _Rank(tensors, used + optim_files, True, flat.stage, rounded)


def read(path: Path, *, weights: Weights = "model", config: Path | None = None) -> Checkpoint:
    """Pickles and config only. ``weights``: what the model computed with, or the fp32 masters.

    Stage 3 stores no model weights; they are the masters, rounded to the training type. Several
    model-parallel ranks are fastllm-train's: shards under canonical names, stage after stage.
    """
    folder = tag_folder(path)
    if folder is None:
        raise UserError(f"{path} is not a DeepSpeed checkpoint")
    files = _list_files(folder)
    ranks = [_read_rank(f, weights, len(files)) for f in files]
    spec, companions = _describe(path, folder, config)
    stages = pipeline_stages([r.tensors for r in ranks], str(folder))
    equal: list[tuple[str, Array, Array]] = []
    tensors: dict[str, Array] = dict(ranks[0].tensors)
    if len(ranks) > 1:
        tensors = {}
        for stage in stages:
            merged, copies = merge_tensor_parallel(spec, stage, str(folder))
            tensors |= merged
            equal += copies
    canonical, tied = to_canonical(spec, tensors, str(folder))
    first = ranks[0]
    kind = f"ZeRO-{first.stage} fp32 masters" if first.masters else "model weights"
    size = f"{max(1, len(files[0].optim))} data-parallel ranks"
    size += f", tp {len(stages[0])}" if len(stages[0]) > 1 else ""
    size += f", pp {len(stages)}" if len(stages) > 1 else ""
    return Checkpoint(
        format="deepspeed",
        summary=f"DeepSpeed {folder.name}, {spec.family}, {kind}, {size}",
        spec=spec,
        tensors=canonical,
        companions=companions,
        checked=members_of([file for rank in ranks for file in rank.used]),
        equal=[*equal, *tied],
        rounded=first.trained_in,
    )


def pipeline_stages(
    ranks: Sequence[Mapping[str, Array]], where: str
) -> list[list[Mapping[str, Array]]]:
    """Model-parallel ranks by stage. Tensor-parallel ranks are neighbours and hold parts of the
    same tensors, stages hold different ones."""
    stages: list[list[Mapping[str, Array]]] = []
    for tensors in ranks:
        if stages and tensors.keys() == stages[-1][0].keys():
            stages[-1].append(tensors)
        else:
            stages.append([tensors])
    seen: set[str] = set()
    for stage in stages:
        twice = seen & stage[0].keys()
        if twice or len(stage) != len(stages[0]):
            what = f"{min(twice)!r} is on two stages" if twice else "stages of several sizes"
            raise UserError(
                f"{where}: model-parallel ranks hold neither parts of the same tensors nor those "
                f"of pipeline stages: {what}",
                hint="a shard is damaged or belongs to another run",
            )
        seen |= stage[0].keys()
    return stages


def merge_tensor_parallel(
    spec: ArchSpec, ranks: Sequence[Mapping[str, Array]], where: str
) -> tuple[dict[str, Array], list[tuple[str, Array, Array]]]:
    """Canonical shards of every rank → whole tensors, and the copies that must be equal.

    With fewer key/value heads than ranks, neighbours hold the same head.
    """
    tp = len(ranks)
    params = {p.name: p for p in iter_params(spec)}
    found: dict[str, Array] = {}
    equal: list[tuple[str, Array, Array]] = []
    for rank, tensors in enumerate(ranks):
        check_names(tensors, list(ranks[0]), f"{where}, model-parallel rank {rank}")
    for name in ranks[0]:
        param = params.get(name)
        if param is None:
            raise UserError(
                f"{where}: {name!r} is not a canonical name",
                hint="tensor-parallel checkpoints are read from fastllm-train and Megatron",
            )
        parts = [r[name] for r in ranks]
        step = tp if param.tp_axis is None else 1
        if param.role in ("attention_k", "attention_v") and spec.kv_heads < tp:
            step = tp // spec.kv_heads
        equal += [
            (f"{name} of ranks {i - i % step} and {i}", parts[i - i % step], part)
            for i, part in enumerate(parts)
            if i % step
        ]
        try:
            found[name] = whole(parts[::step], param.tp_axis)
        except ValueError as error:
            raise UserError(f"{where}: {name!r}: {error}") from None
    return found, equal


def module_tensors(state: Mapping[str, Any], file: Path) -> dict[str, Array]:
    """The ``module`` entry: name → array."""
    module: Any = state.get("module")
    if not isinstance(module, dict):
        raise UserError(
            f"{file} has no module weights", hint="is it part of a pipeline checkpoint?"
        )
    items = cast("dict[str, Any]", module).items()
    bad = [k for k, v in items if not isinstance(v, Array)]
    if bad:
        raise UserError(f"{file}: module entry {bad[0]!r} is not a tensor")
    # DeepSpeed saves the wrapped module; some trainers wrap it once more.
    return {k.removeprefix("module."): v for k, v in items}


def training_type(module: Mapping[str, Array]) -> DType | None:
    """The type of the (empty) module tensors."""
    types = {a.dtype for a in module.values()}
    return types.pop() if len(types) == 1 else None


def _check_world(state: Mapping[str, Any], files: _Files, size: int) -> None:
    world = state.get("dp_world_size")
    said = state.get("mp_world_size", 1)
    if said != size:
        raise UserError(
            f"{files.folder} was saved with model-parallel size {said}, "
            f"the files of {size} ranks are there"
        )
    if isinstance(world, int) and files.optim and len(files.optim) != world:
        raise UserError(
            f"{files.folder} was saved by {world} ranks, the optimizer states of "
            f"{len(files.optim)} are there"
        )
    if isinstance(world, int) and files.per_rank and len(files.model) != world:
        raise UserError(
            f"{files.folder} was saved by {world} ranks, the model states of "
            f"{len(files.model)} are there"
        )


def _read_masters(
    files: _Files, first: TorchFile, used: list[TorchFile]
) -> tuple[Flat, list[TorchFile]]:
    optim_files = [read_torch(files.optim[r]) for r in range(len(files.optim))]
    model_files = [first]
    if files.per_rank:
        rest = [read_torch(files.model[r]) for r in range(1, len(files.model))]
        used += rest
        model_files += rest
    flat = masters([f.entries for f in model_files], [f.entries for f in optim_files], files.folder)
    return flat, optim_files


def _buffers(state: Mapping[str, Any], module: Mapping[str, Array]) -> dict[str, Array]:
    names: Any = state.get("buffer_names") or []
    return {n: module[n] for n in cast("list[str]", names) if n in module and module[n].numel}


def _describe(path: Path, folder: Path, config: Path | None) -> tuple[ArchSpec, Companions]:
    """config.json and tokenizer: given, in the checkpoint's root, or in the tag's folder."""
    found = find_config([path, folder, folder.parent], config)
    if found is None:
        raise UserError(
            f"{path} has no config.json, and DeepSpeed does not say what the model is",
            hint="pass --config path/to/config.json",
        )
    return found


def to_canonical(
    spec: ArchSpec, tensors: Mapping[str, Array], where: str
) -> tuple[dict[str, Array], list[tuple[str, Array, Array]]]:
    """fastllm-train's names are canonical; a Hugging Face model's are its family's."""
    return hf.to_spec(spec, tensors, where)
