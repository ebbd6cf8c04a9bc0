"""DeepSpeed universal checkpoints: ``<tag>_universal/zero/<parameter>/fp32.pt``.

Tensors are whole (tensor parallelism merged) and fp32. Names are the model's own for a plain model,
and ``"<layer number>.<name>"`` for Megatron-DeepSpeed's pipelines, whose gate and up come as
[gate; up]. The fused q, k, v keeps the row order it was saved with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import Checkpoint, check_shapes, members_of
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_zip import TorchFile, read_torch
from fastllm_convert.formats.companions import find_config
from fastllm_convert.formats.deepspeed import to_canonical
from fastllm_convert.formats.megatron import arguments, describe
from fastllm_convert.formats.megatron_deepspeed import pipeline_tables, saved_qkv_layout
from fastllm_convert.formats.megatron_names import DEEPSPEED, QkvLayout, check_family
from fastllm_convert.formats.rank_merge import RankMerge

_LATEST = "latest_universal"


def tag_folder(path: Path) -> Path | None:
    """The ``*_universal`` folder that ``path`` is or points to."""
    latest = path / _LATEST
    if latest.is_file():
        tag = latest.read_bytes()[:256].decode("utf-8", "replace").strip()
        if "/" not in tag and tag not in ("", ".", "..") and (path / tag / "zero").is_dir():
            return path / tag
        raise UserError(f"{latest} names {tag!r}, which is not there")
    return path if (path / "zero").is_dir() else None


def recognises(path: Path) -> bool:
    return tag_folder(path) is not None


def read(
    path: Path,
    *,
    config: Path | None = None,
    vocab_size: int | None = None,
    qkv: QkvLayout | None = None,
) -> Checkpoint:
    """One small pickle per parameter."""
    folder = tag_folder(path)
    if folder is None:
        raise UserError(f"{path} is not a universal checkpoint")
    tensors, files = _read_parameters(folder)
    if all(
        name.partition(".")[0].isdigit() or name.startswith("tied_modules.") for name in tensors
    ):
        return _pipeline(path, folder, tensors, files, config, vocab_size, qkv)
    found = find_config([path, folder, folder.parent, path.parent], config)
    if found is None:
        raise UserError(
            f"{path} has no config.json, and DeepSpeed does not say what the model is",
            hint="pass --config path/to/config.json",
        )
    spec, companions = found
    canonical, equal = to_canonical(spec, tensors, str(folder))
    return Checkpoint(
        format="universal",
        summary=f"DeepSpeed universal {folder.name}, {spec.family}, fp32 masters",
        spec=spec,
        tensors=canonical,
        companions=companions,
        checked=members_of(files),
        equal=equal,
    )


def _read_parameters(folder: Path) -> tuple[dict[str, Array], list[TorchFile]]:
    tensors: dict[str, Array] = {}
    files: list[TorchFile] = []
    for entry in sorted((folder / "zero").iterdir()):
        if not entry.is_dir():
            continue  # optimizer_state.pt
        if not (entry / "fp32.pt").is_file():
            raise UserError(f"{entry / 'fp32.pt'} is missing")
        file = read_torch(entry / "fp32.pt")
        array = file.entries.get("param") if isinstance(file.value, dict) else file.value
        if not isinstance(array, Array):
            raise UserError(f"{entry / 'fp32.pt'} holds no parameter")
        tensors[entry.name] = array
        files.append(file)
    if not tensors:
        raise UserError(f"{folder / 'zero'} holds no parameters")
    return tensors, files


def _pipeline(
    path: Path,
    folder: Path,
    tensors: Mapping[str, Array],
    files: list[TorchFile],
    config: Path | None,
    vocab_size: int | None,
    qkv: QkvLayout | None,
) -> Checkpoint:
    models = sorted(folder.glob("mp_rank_*_model_states.pt"))
    args: Mapping[str, Any] = arguments(read_torch(models[0])) if models else {}
    layers: dict[int, dict[str, Array]] = {}
    for name, array in tensors.items():
        if name.startswith("tied_modules.embed."):
            layers.setdefault(-1, {})[name.removeprefix("tied_modules.embed.")] = array
            continue
        number, _, leaf = name.partition(".")
        layers.setdefault(int(number), {})[leaf] = array
    ordered = [layers[n] for n in sorted(layers)]
    embedding = ordered[0].get(DEEPSPEED.embedding)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{folder}: the first layer holds no {DEEPSPEED.embedding}")
    rows = embedding.shape[0]
    spec, companions, notes = describe(path, folder, args, rows, config, vocab_size)
    check_family(spec)
    saved_tp = args.get("tensor_model_parallel_size")
    tp = saved_tp if isinstance(saved_tp, int) else 1
    layout = qkv or saved_qkv_layout(args, spec, tp, folder)
    if layout == "concat" and tp > 1:
        raise UserError(
            f"{folder}: q, k, v were saved as thirds of each of {tp} ranks and merged since",
            hint="convert the original checkpoint instead",
        )
    merge = RankMerge(spec, 1, rows, str(folder))
    tables = pipeline_tables(spec, 1, layout)
    if len(tables) != len(ordered):
        raise UserError(
            f"{folder}: parameters of {len(ordered)} pipeline layers, the model has {len(tables)}"
        )
    for table, held in zip(tables, ordered, strict=True):
        merge.add(table, [held])
    kept, tied = check_shapes(spec, merge.finish(), str(folder))
    return Checkpoint(
        format="universal",
        summary=f"DeepSpeed universal {folder.name} (pipeline), {spec.family}, {layout} q, k, v",
        spec=spec,
        tensors=kept,
        companions=companions,
        checked=members_of(files),
        equal=[*merge.equal, *tied],
        notes=notes,
    )
