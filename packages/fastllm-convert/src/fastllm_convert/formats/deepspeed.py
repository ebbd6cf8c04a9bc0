"""DeepSpeed checkpoints of a whole model: ZeRO 0, 1, 2 and 3 (no tensor or pipeline parallelism).

``<root>/latest`` names ``<root>/global_stepN``. Model weights lie in ``mp_rank_00_model_states.pt``
(stage 3: one file per rank, its tensors empty); fp32 masters, as flat partitions, in
``*zero_pp_rank_R_mp_rank_00_optim_states.pt``. Layout rules: ``docs/convert.md``; every shape and
count is checked against what the files say of themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import (
    Checkpoint,
    Companions,
    check_shapes,
    members_of,
)
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_zip import TorchFile, read_torch
from fastllm_convert.formats import hf
from fastllm_convert.formats.companions import find_config
from fastllm_convert.formats.zero_partitions import Flat, masters
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


def _list_files(folder: Path) -> _Files:
    model: dict[int, Path] = {}
    optim: dict[int, Path] = {}
    per_rank = False
    for file in sorted(folder.glob("*.pt")):
        if found := _MODEL.match(file.name):
            rank, shard = found.groups()
            per_rank = per_rank or rank is not None
            model[int(rank or 0)] = file
        elif found := _OPTIM.match(file.name):
            rank, shard = found.groups()
            optim[int(rank)] = file
        else:
            continue
        if int(shard) != 0:
            raise UserError(
                f"{file} belongs to a model-parallel checkpoint without layer files",
                hint="only Megatron-DeepSpeed's pipeline layout is read with tensor parallelism",
            )
    for kind, ranks in (("model", model), ("optimizer", optim)):
        absent = [r for r in range(max(ranks, default=-1) + 1) if r not in ranks]
        if absent:
            raise UserError(f"{folder}: no {kind} states of data-parallel rank {absent[0]}")
    return _Files(folder, model, optim, per_rank)


def read(path: Path, *, weights: Weights = "model", config: Path | None = None) -> Checkpoint:
    """Pickles and config only. ``weights``: what the model computed with, or the fp32 masters.

    Stage 3 stores no model weights; they are the masters, rounded to the training type.
    """
    folder = tag_folder(path)
    if folder is None:
        raise UserError(f"{path} is not a DeepSpeed checkpoint")
    files = _list_files(folder)
    first = read_torch(files.model[0])
    state = first.entries
    module = module_tensors(state, files.model[0])
    _check_world(state, files)
    stage3 = files.per_rank and all(a.numel == 0 for a in module.values())
    used = [first]
    if weights == "master" or stage3:
        flat, optim_files, stage = _read_masters(files, first, used)
        tensors = {**flat.tensors, **_buffers(state, module)}
        used += optim_files
        kind = f"ZeRO-{stage}, {len(files.optim)} ranks, fp32 masters"
    else:
        tensors = module
        kind = f"model weights, {max(1, len(files.optim))} ranks"
    spec, companions = _describe(path, folder, config)
    canonical, equal = to_canonical(spec, tensors, str(folder))
    return Checkpoint(
        format="deepspeed",
        summary=f"DeepSpeed {folder.name}, {spec.family}, {kind}",
        spec=spec,
        tensors=canonical,
        companions=companions,
        checked=members_of(used),
        equal=equal,
        rounded=training_type(module) if stage3 and weights == "model" else None,
    )


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


def training_type(module: Mapping[str, Array]) -> Any:
    """The type of the (empty) module tensors."""
    types = {a.dtype for a in module.values()}
    return types.pop() if len(types) == 1 else None


def _check_world(state: Mapping[str, Any], files: _Files) -> None:
    world = state.get("dp_world_size")
    if state.get("mp_world_size", 1) != 1:
        raise UserError(
            f"{files.folder} was saved with model-parallel size {state['mp_world_size']}, "
            "and has no layer files"
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
) -> tuple[Flat, list[TorchFile], int]:
    optim_files = [read_torch(files.optim[r]) for r in range(len(files.optim))]
    model_files = [first]
    if files.per_rank:
        rest = [read_torch(files.model[r]) for r in range(1, len(files.model))]
        used += rest
        model_files += rest
    flat = masters([f.entries for f in model_files], [f.entries for f in optim_files], files.folder)
    return flat, optim_files, flat.stage


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
    kept = {n: a for n, a in tensors.items() if not hf.is_derived(n)}
    canonical = {p.name for p in iter_params(spec)}
    if kept.keys() <= canonical or spec.family in ("llama", "mistral", "qwen2", "qwen3"):
        return check_shapes(spec, kept, where)
    return hf.to_spec(spec, kept, where)
