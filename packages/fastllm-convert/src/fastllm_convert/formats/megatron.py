"""Megatron-LM ``torch`` checkpoints: ``iter_*/mp_rank_TT[_PPP]/model_optim_rng.pt``, any TP and PP.

Both generations of names are read (``formats.megatron_names``); which one is seen from the keys.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import Checkpoint, Companions, check_shapes, members_of
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_globals import Call
from fastllm_convert.files.torch_zip import TorchFile, read_torch
from fastllm_convert.formats.companions import find_config
from fastllm_convert.formats.megatron_args import spec_from_args
from fastllm_convert.formats.megatron_names import (
    CORE,
    CORE_TE,
    LEGACY,
    Dialect,
    QkvLayout,
    check_family,
    chunk_rows,
    expert_ranges,
)
from fastllm_convert.formats.megatron_writer import tied_head_name
from fastllm_convert.formats.rank_merge import RankMerge
from fastllm_convert.sharding import layer_ranges
from fastllm_planner.arch import ArchSpec

_RANK = re.compile(r"^mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?$")
_FILE = "model_optim_rng.pt"
_LATEST = "latest_checkpointed_iteration.txt"


def iteration_folder(path: Path) -> Path | None:
    """The ``iter_NNNNNNN`` or ``release`` folder that ``path`` is or points to."""
    latest = path / _LATEST
    if latest.is_file() and not (path / "latest").is_file():
        text = latest.read_bytes()[:64].decode("utf-8", "replace").strip()
        if text != "release" and not text.isdigit():
            raise UserError(f"{latest} says {text!r}: neither an iteration nor 'release'")
        name = text if text == "release" else f"iter_{int(text):07d}"
        if not (path / name).is_dir():
            raise UserError(f"{latest} names {name}, which is not there")
        return path / name
    if any(_RANK.match(p.name) and (p / _FILE).is_file() for p in path.iterdir() if p.is_dir()):
        return path
    return None


def recognises(path: Path) -> bool:
    folder = iteration_folder(path)
    return folder is not None and any(_RANK.match(p.name) for p in folder.iterdir())


@dataclass(frozen=True)
class _Ranks:
    files: Mapping[tuple[int, int, int], TorchFile]  # (tensor rank, pipeline stage, expert rank)
    tp: int
    pp: int
    ep: int


def _read_ranks(folder: Path) -> _Ranks:
    found: dict[tuple[int, ...], TorchFile] = {}
    for entry in sorted(folder.iterdir()):
        match = _RANK.match(entry.name)
        if match is None or not entry.is_dir():
            continue
        if not (entry / _FILE).is_file():
            raise UserError(f"{entry / _FILE} is missing")
        found[tuple(int(n) for n in match.groups() if n is not None)] = read_torch(entry / _FILE)
    counts = {len(numbers) for numbers in found}
    if len(counts) != 1:
        raise UserError(f"{folder}: rank folders of different kinds (mp_rank_TT, mp_rank_TT_PPP)")
    # Two numbers are a tensor rank and a stage, or, without pipeline, a tensor and an expert rank.
    args = arguments(next(iter(found.values())))
    experts = args.get("expert_model_parallel_size")
    without_pipeline = (
        counts == {2}
        and isinstance(experts, int)
        and experts > 1
        and args.get("pipeline_model_parallel_size") in (1, None)
    )
    files: dict[tuple[int, int, int], TorchFile] = {}
    for numbers, file in found.items():
        first, second, third = (*numbers, 0, 0)[:3]
        files[(first, 0, second) if without_pipeline else (first, second, third)] = file
    tp, pp, ep = (max(k[i] for k in files) + 1 for i in range(3))
    for key in itertools.product(range(tp), range(pp), range(ep)):
        if key not in files:
            expert = f", expert rank {key[2]}" if ep > 1 else ""
            raise UserError(
                f"{folder}: the file of tensor rank {key[0]}, stage {key[1]}{expert} is missing"
            )
    return _Ranks(files, tp, pp, ep)


def read(
    path: Path,
    *,
    config: Path | None = None,
    vocab_size: int | None = None,
    qkv: QkvLayout | None = None,
) -> Checkpoint:
    """Pickles only. ``qkv`` None: by ``checkpoint_version``."""
    folder = iteration_folder(path)
    if folder is None:
        raise UserError(f"{path} is not a Megatron checkpoint")
    ranks = _read_ranks(folder)
    chunks = {key: _chunks(file) for key, file in ranks.files.items()}
    vp = len(chunks[0, 0, 0])
    if any(len(c) != vp for c in chunks.values()):
        raise UserError(f"{folder}: ranks hold different numbers of model chunks")
    args = arguments(ranks.files[0, 0, 0])
    _check_sizes(args, ranks, folder)
    dialect = _dialect(chunks)
    rows = _embedding_rows(chunks[0, 0, 0][0], dialect, folder) * ranks.tp
    spec, companions, notes = describe(path, folder, args, rows, config, vocab_size)
    check_family(spec)
    experts = expert_ranges(spec, ranks.ep)
    merge = RankMerge(spec, ranks.tp, rows, str(folder))
    qkv = qkv or _qkv_version(ranks.files[0, 0, 0].entries)
    stages = layer_ranges(spec.layers, ranks.pp, vp)
    for stage, index, rank in itertools.product(range(ranks.pp), range(vp), range(ranks.ep)):
        tensors = [chunks[t, stage, rank][index] for t in range(ranks.tp)]
        first = stage == 0 and index == 0
        last = stage == ranks.pp - 1 and index == vp - 1
        table = chunk_rows(
            spec, stages[stage][index], dialect, tp=ranks.tp, qkv=qkv, first=first, last=last,
            experts=experts[rank],
        )  # fmt: skip
        # Its own copy on a stage without the embedding; some versions save it everywhere.
        tied_head = [tied_head_name(dialect)] if last and spec.tied_embeddings else []
        merge.add(table, tensors, tied_head=tied_head)
    kept, tied = check_shapes(spec, merge.finish(), str(folder))
    size = f"tp {ranks.tp}, pp {ranks.pp}" + (f", {vp} virtual stages" if vp > 1 else "")
    size += f", ep {ranks.ep}" if ranks.ep > 1 else ""
    return Checkpoint(
        format="megatron",
        summary=f"Megatron-LM ({dialect.name} names), {spec.family}, {size}",
        spec=spec,
        tensors=kept,
        companions=companions,
        checked=members_of(list(ranks.files.values())),
        equal=[*merge.equal, *tied],
        notes=notes,
    )


def arguments(file: TorchFile) -> dict[str, Any]:
    """The ``args`` Namespace as a dict (empty when there is none)."""
    args = file.entries.get("args")
    return args.attributes if isinstance(args, Call) else {}


def describe(
    path: Path,
    folder: Path,
    args: Mapping[str, Any],
    padded_rows: int,
    config: Path | None,
    vocab_size: int | None,
) -> tuple[ArchSpec, Companions, list[str]]:
    """The model: from ``--config``, a config.json beside the checkpoint, or the saved args."""
    found = find_config([path, folder, folder.parent], config)
    if found is not None:
        spec, companions = found
        notes: list[str] = []
    else:
        spec, notes = spec_from_args(args, padded_rows)
        companions = Companions(folder=path)
    if vocab_size is not None:
        from dataclasses import replace

        spec = replace(spec, vocab=vocab_size)
        notes = [n for n in notes if "--vocab-size" not in n]
    if spec.vocab > padded_rows:
        raise UserError(f"{folder}: {padded_rows} embedding rows, the vocabulary is {spec.vocab}")
    return spec, companions, notes


def _chunks(file: TorchFile) -> list[dict[str, Array]]:
    """Flat tensors of ``model``, or of ``model0``, ``model1``, ... (virtual stages)."""
    entries = file.entries
    if "model" in entries:
        return [flatten(entries["model"], file)]
    found: list[dict[str, Array]] = []
    while f"model{len(found)}" in entries:
        found.append(flatten(entries[f"model{len(found)}"], file))
    if not found:
        raise UserError(f"{file.file.path} holds no model")
    return found


_ALIASES = (  # names before September 2023
    (".attention.", ".self_attention."),
    (".input_layernorm.", ".input_norm."),
    (".post_attention_layernorm.", ".post_attention_norm."),
    ("encoder.final_layernorm.", "encoder.final_norm."),
    # Megatron-DeepSpeed without pipeline.
    (".mlp.deepspeed_moe.gate.wg.", ".mlp.router."),
    (".mlp.deepspeed_moe.experts.deepspeed_experts.", ".mlp.local_experts."),
)


def flatten(model: Any, file: TorchFile) -> dict[str, Array]:
    """Nested dicts → dotted names, old aliases replaced, ``_extra_state`` dropped."""
    flat: dict[str, Array] = {}

    def walk(value: Any, prefix: str) -> None:
        if isinstance(value, dict):
            for key, item in cast("dict[Any, Any]", value).items():
                walk(item, f"{prefix}.{key}" if prefix else str(key))
        elif prefix.endswith("_extra_state"):
            return  # TransformerEngine's FP8 bookkeeping, None or bytes: not a weight
        elif isinstance(value, Array):
            flat[prefix] = value
        else:
            raise UserError(f"{file.file.path}: model entry {prefix!r} is not a tensor")

    walk(model, "")
    legacy = any(n.startswith("language_model.") for n in flat)
    found: dict[str, Array] = {}
    for name, array in flat.items():
        name = name.removeprefix("module.").removeprefix("language_model.")
        if legacy:
            name = re.sub(r"^transformer\.", "encoder.", name)
            for old, new in _ALIASES:
                name = name.replace(old, new)
        found[name] = array
    return found


def _dialect(chunks: Mapping[tuple[int, int, int], list[dict[str, Array]]]) -> Dialect:
    names = [n for row in chunks.values() for chunk in row for n in chunk]
    if any(n.startswith("encoder.") for n in names):
        return LEGACY
    if any(n.endswith("layer_norm_weight") for n in names):
        return CORE_TE
    return CORE


def _embedding_rows(chunk: Mapping[str, Array], dialect: Dialect, folder: Path) -> int:
    array = chunk.get(dialect.embedding)
    if array is None or len(array.shape) != 2:
        raise UserError(f"{folder}: the first stage has no {dialect.embedding!r}")
    return array.shape[0]


def _check_sizes(args: Mapping[str, Any], ranks: _Ranks, folder: Path) -> None:
    """The files' numbering against what the checkpoint says of itself."""
    for key, found in (
        ("tensor_model_parallel_size", ranks.tp),
        ("pipeline_model_parallel_size", ranks.pp),
        ("expert_model_parallel_size", ranks.ep),
    ):
        said = args.get(key)
        if isinstance(said, int) and said != found:
            raise UserError(f"{folder}: saved with {key}={said}, the files of {found} are there")
    split = args.get("expert_tensor_parallel_size")
    if isinstance(split, int) and split != ranks.tp and args.get("num_experts"):
        raise UserError(
            f"{folder}: experts split over {split} ranks and the rest over {ranks.tp} are not read",
            hint="save as torch_dist, or with expert-tensor-parallel-size as large as the other",
        )


def _qkv_version(entries: Mapping[str, Any]) -> QkvLayout:
    """checkpoint_version 0: q, k, v stacked; 1: by row; 2 and later: per group."""
    version = entries.get("checkpoint_version", 0)
    if not isinstance(version, int | float):
        raise UserError(f"checkpoint_version {version!r}")
    if version >= 2:
        return "interleaved"
    return "version1" if version >= 1 else "concat"
