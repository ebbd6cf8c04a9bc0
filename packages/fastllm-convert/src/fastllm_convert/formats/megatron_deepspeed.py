"""Megatron-DeepSpeed's pipeline checkpoints: one file per layer and tensor-parallel rank.

``global_stepN/layer_LL-model_TT-model_states.pt``: 1 the embedding, 2 to L+1 the layers, L+2 the
final norm, L+3 the head (untied). BLOOM-era files leave gaps. ``mp_rank_MM_model_states.pt``
(MM = stage * tp + rank) holds ``args`` and no weights; the fp32 masters lie in ZeRO shards per mp
rank, under the names ``"<layer number>.<name>"``.

The rows of the fused q, k, v changed order without a version bump in Megatron-DeepSpeed 676a482c
(#441, 2024-12-04): per key/value group before, plain thirds per rank after. Files of the later code
have ``ds_sequence_parallel_fpdt`` in their args.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import Checkpoint, check_shapes, members_of
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_zip import TorchFile, read_torch
from fastllm_convert.formats.deepspeed import Weights, optimizer_files, tag_folder
from fastllm_convert.formats.megatron import arguments, describe
from fastllm_convert.formats.megatron_names import (
    DEEPSPEED,
    QkvLayout,
    check_family,
    embedding_rows,
    final_rows,
    layer_rows,
)
from fastllm_convert.formats.rank_merge import RankMerge
from fastllm_convert.formats.zero_partitions import masters
from fastllm_convert.layouts import Row
from fastllm_planner.arch import ArchSpec

_LAYER = re.compile(r"^layer_(\d+)-model_(\d+)-model_states\.pt$")
_MODEL = re.compile(r"^mp_rank_(\d+)_model_states\.pt$")

Layers = dict[int, dict[str, Array]]  # layer number → name → array, of one tensor rank


def recognises(path: Path) -> bool:
    """A DeepSpeed checkpoint with pipeline layer files, or with Megatron's nested names."""
    from fastllm_convert.formats import megatron_deepspeed_whole

    folder = tag_folder(path)
    return folder is not None and (
        _has_layers(folder) or megatron_deepspeed_whole.recognises(folder)
    )


def _has_layers(folder: Path) -> bool:
    return any(_LAYER.match(p.name) for p in folder.glob("layer_*.pt"))


@dataclass(frozen=True)
class _Saved:
    folder: Path
    numbers: list[int]  # as the files are numbered; BLOOM's code left gaps
    ranks: list[Layers]
    files: list[TorchFile]
    args: Mapping[str, Any]
    models: Mapping[int, TorchFile]  # mp rank → mp_rank file


def read(
    path: Path,
    *,
    weights: Weights = "model",
    config: Path | None = None,
    vocab_size: int | None = None,
    qkv: QkvLayout | None = None,
) -> Checkpoint:
    """Pickles only. ``qkv`` None: by the saved args; refused when they do not tell."""
    folder = tag_folder(path)
    if folder is None:
        raise UserError(f"{path} is not a DeepSpeed checkpoint")
    if not _has_layers(folder):
        from fastllm_convert.formats import megatron_deepspeed_whole

        return megatron_deepspeed_whole.read(
            path, folder, weights=weights, config=config, vocab_size=vocab_size, qkv=qkv
        )
    saved = _read_layers(folder)
    tp = len(saved.ranks)
    embedding = saved.ranks[0][saved.numbers[0]].get(DEEPSPEED.embedding)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{folder}: the first layer file holds no {DEEPSPEED.embedding}")
    rows = embedding.shape[0] * tp
    spec, companions, notes = describe(path, folder, saved.args, rows, config, vocab_size)
    check_family(spec)
    _check_layout(saved, spec, tp)
    layout = qkv or saved_qkv_layout(saved.args, spec, tp, folder)
    ranks, files, kind = saved.ranks, saved.files, "layer files"
    if weights == "master":
        ranks, files = _master_layers(saved, tp)
        kind = "fp32 masters"
    merge = RankMerge(spec, tp, rows, str(folder))
    for number, table in zip(saved.numbers, pipeline_tables(spec, tp, layout), strict=True):
        merge.add(table, [r.get(number, {}) for r in ranks])
    kept, tied_pairs = check_shapes(spec, merge.finish(), str(folder))
    pp = max(1, len(saved.models) // tp)
    return Checkpoint(
        format="megatron-deepspeed",
        summary=f"Megatron-DeepSpeed {folder.name}, {spec.family}, tp {tp}, pp {pp}, {kind}, "
        f"{layout} q, k, v",
        spec=spec,
        tensors=kept,
        companions=companions,
        checked=members_of(files),
        equal=[*merge.equal, *tied_pairs],
        notes=notes,
    )


def pipeline_tables(spec: ArchSpec, tp: int, qkv: QkvLayout) -> list[list[Row]]:
    """The rows of every pipeline layer that has parameters, in order."""
    tables = [embedding_rows(spec, DEEPSPEED)]
    for layer in range(spec.layers):
        tables.append(layer_rows(spec, layer, DEEPSPEED, tp=tp, qkv=qkv))
    final = final_rows(spec, DEEPSPEED)
    tables.append([r for r in final if r.name != DEEPSPEED.head])
    head = [r for r in final if r.name == DEEPSPEED.head]
    return [*tables, head] if head else tables


def _read_layers(folder: Path) -> _Saved:
    ranks: dict[int, Layers] = {}
    files: list[TorchFile] = []
    models: dict[int, TorchFile] = {}
    for entry in sorted(folder.glob("*.pt")):
        if found := _LAYER.match(entry.name):
            file = read_torch(entry)
            files.append(file)
            tensors = {k: v for k, v in file.entries.items() if isinstance(v, Array)}
            number, rank = int(found[1]), int(found[2])
            ranks.setdefault(rank, {})[number] = tensors
        elif found := _MODEL.match(entry.name):
            models[int(found[1])] = read_torch(entry)
    absent = [r for r in range(max(ranks) + 1) if r not in ranks]
    if absent:
        raise UserError(f"{folder}: no layer files of tensor rank {absent[0]}")
    numbers = set(ranks[0])
    for rank, layers in ranks.items():
        if set(layers) != numbers:
            odd = min(numbers.symmetric_difference(layers))
            raise UserError(
                f"{folder}: layer {odd:02d} is not there for every rank (see rank {rank})"
            )
    gaps = set(range(min(numbers), max(numbers) + 1)) - numbers
    if gaps:
        raise UserError(f"{folder}: layer_{min(gaps):02d} files are missing")
    args: Mapping[str, Any] = arguments(models[0]) if 0 in models else {}
    held = [ranks[r] for r in range(len(ranks))]
    return _Saved(folder, sorted(numbers), held, files, args, models)


def _check_layout(saved: _Saved, spec: ArchSpec, tp: int) -> None:
    said = saved.args.get("tensor_model_parallel_size")
    if isinstance(said, int) and said != tp:
        raise UserError(
            f"{saved.folder}: saved with tensor parallelism {said}, "
            f"the files of {tp} ranks are there"
        )
    expected = spec.layers + (2 if spec.tied_embeddings else 3)
    found = len(saved.ranks[0])
    if found != expected:
        raise UserError(
            f"{saved.folder}: layer files of {found} pipeline layers, the model needs {expected}",
            hint="a layer file is missing, or the config describes another model",
        )


def saved_qkv_layout(args: Mapping[str, Any], spec: ArchSpec, tp: int, folder: Path) -> QkvLayout:
    """By the args that the code generations save; ``UserError`` when they do not tell.

    The hf2megads converter of the later code still writes the earlier order (seen in its output);
    a run that trained on such a file without noticing would hold either.
    """
    if spec.kv_heads == tp:
        return "interleaved"  # one group per rank: both orders are the same
    if args and "ds_sequence_parallel_fpdt" not in args:
        return "interleaved"
    converted = args.get("hf_ckpt_dir") is not None
    if args and not converted:
        return "concat"
    if converted and args.get("iteration", 0) == 0 and args.get("consumed_train_samples", 0) == 0:
        return "interleaved"
    raise UserError(
        f"{folder}: the row order of the fused q, k, v cannot be told from the saved args",
        hint="pass --qkv-layout interleaved (code before 2024-12-04) or concat (after)",
    )


def _master_layers(saved: _Saved, tp: int) -> tuple[list[Layers], list[TorchFile]]:
    """fp32 masters of every (stage, rank), regrouped by layer number."""
    ranks: list[Layers] = [{} for _ in range(tp)]
    used: list[TorchFile] = []
    if not saved.models:
        raise UserError(f"{saved.folder}: no mp_rank files, so the masters cannot be told apart")
    for mp, model in sorted(saved.models.items()):
        shards = [read_torch(f) for f in optimizer_files(saved.folder, mp)]
        if not shards:
            raise UserError(f"{saved.folder}: no optimizer states of model-parallel rank {mp}")
        _check_dp(model, len(shards), saved.folder)
        used += [model, *shards]
        flat = masters([model.entries], [s.entries for s in shards], saved.folder)
        for name, array in flat.tensors.items():
            number, _, leaf = _layer_of(name, saved).partition(".")
            ranks[mp % tp].setdefault(int(number), {})[leaf] = array
    return ranks, used


def _check_dp(model: TorchFile, found: int, folder: Path) -> None:
    said = model.entries.get("dp_world_size")
    if isinstance(said, int) and said != found:
        raise UserError(
            f"{folder}: {said} data-parallel ranks saved, the shards of {found} are there"
        )


def _layer_of(name: str, saved: _Saved) -> str:
    """``tied_modules.embed.<leaf>`` is the embedding's; anything else starts with a number."""
    if name.startswith("tied_modules.embed."):
        return f"{saved.numbers[0]}.{name.removeprefix('tied_modules.embed.')}"
    head, _, leaf = name.partition(".")
    if not head.isdigit() or not leaf:
        raise UserError(f"{saved.folder}: parameter {name!r} belongs to no layer")
    return name
