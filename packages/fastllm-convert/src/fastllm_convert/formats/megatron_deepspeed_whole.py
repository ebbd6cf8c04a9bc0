"""Megatron-DeepSpeed without pipeline (``--no-pipeline-parallel``), the only way it has experts.

``mp_rank_TT_model_states.pt`` holds the rank's model under legacy Megatron's nested names, and each
expert lies in ``layer_L_expert_E_mp_rank_TT_model_states.pt`` (L counts the layers that have
experts, E all experts), whatever the expert-parallel size was: names and files are DeepSpeed's
(runtime/engine.py, ``_save_moe_checkpoint``). Experts are whole on every tensor rank unless
``enable_expert_tensor_parallelism`` was set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import Checkpoint, check_shapes, members_of
from fastllm_convert.engine.plan import OutputFile
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_pickle_writer import Namespace, Ordered, Tensor
from fastllm_convert.files.torch_writer import torch_file
from fastllm_convert.files.torch_zip import TorchFile, read_torch
from fastllm_convert.formats.deepspeed import Weights, optimizer_files
from fastllm_convert.formats.megatron import arguments, describe, flatten
from fastllm_convert.formats.megatron_deepspeed import saved_qkv_layout
from fastllm_convert.formats.megatron_names import (
    DEEPSPEED_WHOLE,
    LEGACY,
    QkvLayout,
    check_family,
    chunk_rows,
)
from fastllm_convert.formats.megatron_writer import RankTensors, nested, tied_head_name
from fastllm_convert.formats.rank_merge import RankMerge
from fastllm_convert.formats.zero_partitions import masters

_MODEL = re.compile(r"^mp_rank_(\d+)_model_states\.pt$")
_EXPERT = re.compile(r"^layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt$")


def recognises(folder: Path) -> bool:
    """Is the model in ``folder`` stored under Megatron's nested names?"""
    first = folder / "mp_rank_00_model_states.pt"
    if not first.is_file():
        return False
    value: object = read_torch(first).value
    module: object = (
        cast("dict[str, Any]", value).get("module") if isinstance(value, dict) else None
    )
    return isinstance(module, dict) and "language_model" in module


def read(
    path: Path,
    folder: Path,
    *,
    weights: Weights,
    config: Path | None,
    vocab_size: int | None,
    qkv: QkvLayout | None,
) -> Checkpoint:
    """Pickles only. Masters (of dense models) are those of each rank's optimizer shards."""
    models = _by_rank(folder)
    tp = len(models)
    args = arguments(models[0])
    said = args.get("tensor_model_parallel_size")
    if isinstance(said, int) and said != tp:
        raise UserError(
            f"{folder}: saved with tensor parallelism {said}, the files of {tp} ranks are there"
        )
    expert_tp = tp if args.get("enable_expert_tensor_parallelism") else 1
    ranks, used = _tensors(folder, models, whole_experts=expert_tp == 1)
    embedding = ranks[0].get(LEGACY.embedding)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{folder} holds no {LEGACY.embedding}")
    rows = embedding.shape[0] * tp
    spec, companions, notes = describe(path, folder, args, rows, config, vocab_size)
    check_family(spec)
    if weights == "master":
        if spec.moe is not None:
            raise UserError(
                "the masters of expert-parallel optimizers are not read", hint="--weights model"
            )
        ranks, used = _masters(folder, models)
    layout = qkv or saved_qkv_layout(args, spec, tp, folder)
    merge = RankMerge(spec, tp, rows, str(folder), expert_tp=expert_tp)
    table = chunk_rows(
        spec, range(spec.layers), LEGACY, tp=tp, qkv=layout, first=True, last=True,
        expert_tp=expert_tp,
    )  # fmt: skip
    merge.add(table, ranks, tied_head=[tied_head_name(LEGACY)] if spec.tied_embeddings else [])
    kept, tied = check_shapes(spec, merge.finish(), str(folder))
    kind = "fp32 masters" if weights == "master" else "model weights"
    return Checkpoint(
        format="megatron-deepspeed",
        summary=f"Megatron-DeepSpeed {folder.name} without pipeline, {spec.family}, tp {tp}, "
        f"{kind}, {layout} q, k, v",
        spec=spec,
        tensors=kept,
        companions=companions,
        checked=members_of(used),
        equal=[*merge.equal, *tied],
        notes=notes,
    )


def _by_rank(folder: Path) -> list[TorchFile]:
    found = {int(m[1]): p for p in folder.glob("*.pt") if (m := _MODEL.match(p.name))}
    absent = [r for r in range(max(found) + 1) if r not in found]
    if absent:
        raise UserError(f"{folder}: no model states of tensor rank {absent[0]}")
    return [read_torch(found[r]) for r in range(len(found))]


def _tensors(
    folder: Path, models: list[TorchFile], *, whole_experts: bool
) -> tuple[list[dict[str, Array]], list[TorchFile]]:
    """Each rank's tensors, those of its experts' files among them."""
    ranks: list[dict[str, Array]] = []
    for file in models:
        module: Any = file.entries.get("module")
        if not isinstance(module, dict):
            raise UserError(f"{file.file.path} has no module weights")
        ranks.append(flatten(cast("dict[str, Any]", module), file))
    used = list(models)
    files = {
        tuple(map(int, m.groups())): p
        for p in sorted(folder.glob("layer_*_expert_*.pt"))
        if (m := _EXPERT.match(p.name))
    }
    shared = whole_experts and all(rank == 0 for *_, rank in files)
    for (*_, rank), path in files.items():
        if rank >= len(ranks):
            raise UserError(f"{path.name} is of tensor rank {rank}, there are {len(ranks)}")
        file = read_torch(path)
        used.append(file)
        held = flatten(file.entries, file)
        for each in ranks if shared else [ranks[rank]]:
            twice = next((n for n in held if n in each), None)
            if twice is not None:
                raise UserError(f"{path}: {twice!r} is in another file too")
            each.update(held)
    return ranks, used


def _masters(
    folder: Path, models: list[TorchFile]
) -> tuple[list[dict[str, Array]], list[TorchFile]]:
    ranks: list[dict[str, Array]] = []
    used: list[TorchFile] = []
    for rank, model in enumerate(models):
        shards = [read_torch(f) for f in optimizer_files(folder, rank)]
        if not shards:
            raise UserError(f"{folder}: no optimizer states of model-parallel rank {rank}")
        said = model.entries.get("dp_world_size")
        if isinstance(said, int) and said != len(shards):
            raise UserError(
                f"{folder}: {said} data-parallel ranks saved, the shards of {len(shards)} are there"
            )
        flat = masters([model.entries], [s.entries for s in shards], folder)
        ranks.append(flatten(dict(flat.tensors), model))
        used += [model, *shards]
    return ranks, used


def files_to_write(
    tensors: RankTensors,
    tag: str,
    qkv: QkvLayout,
    args: Mapping[str, Any],
    state: Mapping[str, Any],
) -> list[OutputFile]:
    """A file per tensor rank, and one per expert and rank. ``tensors`` keeps experts whole."""
    spec, tp = tensors.source.spec, tensors.parallel.tp
    rows = chunk_rows(
        spec, range(spec.layers), DEEPSPEED_WHOLE, tp=tp, qkv=qkv, first=True, last=True,
        expert_tp=tensors.expert_tp,
    )  # fmt: skip
    moe_layers = [n for n in range(spec.layers) if spec.is_moe_layer(n)]
    files: list[OutputFile] = []
    for rank in range(tp):
        model: dict[str, Tensor] = {}
        experts: dict[tuple[int, int], dict[str, Tensor]] = {}
        for row in rows:
            param = tensors.params[row.canonical[0]]
            held = tensors.tensor(row, rank)
            if param.expert is None or param.layer is None:
                model[row.name] = held
            else:
                place = moe_layers.index(param.layer), param.expert
                experts.setdefault(place, {})[f"language_model.{row.name}"] = held
        saved = {**state, "module": nested(model), "args": Namespace(args)}
        files.append(torch_file(f"{tag}/mp_rank_{rank:02d}_model_states.pt", saved))
        for (layer, expert), content in experts.items():
            name = f"layer_{layer}_expert_{expert}_mp_rank_{rank:02d}_model_states.pt"
            files.append(torch_file(f"{tag}/{name}", Ordered(content)))
    return files
