"""Hugging Face folders: ``config.json``, safetensors (or ``pytorch_model*.bin``), an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import (
    Checkpoint,
    check_shapes,
    from_rows,
    members_of,
)
from fastllm_convert.errors import UserError
from fastllm_convert.files.json_file import read_object
from fastllm_convert.files.safetensors_file import read_header
from fastllm_convert.formats.companions import find_config
from fastllm_convert.formats.hf_names import (
    UnsupportedFamily,
    head_row,
    is_derived,
    name_table,
)
from fastllm_planner.arch import ArchSpec, iter_params

if TYPE_CHECKING:
    from fastllm_convert.files.torch_zip import TorchFile

__all__ = ["UnsupportedFamily", "name_table", "read", "recognises"]

SAFE_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")


def model_folder(path: Path) -> Path | None:
    """The folder with the weights: ``path``, or the tag that its ``latest`` names (fastllm-train's
    portable checkpoints)."""
    if _has_weights(path):
        return path
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_bytes()[:256].decode("utf-8", "replace").strip()
        if "/" not in tag and tag not in ("", ".", "..") and _has_weights(path / tag):
            return path / tag
    return None


def _has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in (SAFE_INDEX, BIN_INDEX, *SINGLE))


def recognises(path: Path) -> bool:
    """A folder with weights under Hugging Face's file names."""
    return model_folder(path) is not None


def read(path: Path) -> Checkpoint:
    """Headers and configs only. Raises ``UserError`` for anything missing, extra or misshapen."""
    folder = model_folder(path) or path
    tensors, torch_files, kind = read_tensors(folder)
    found = find_config([folder, path], None)
    if found is None:
        raise UserError(f"{folder} has no config.json")
    spec, companions = found
    canonical, equal = to_spec(spec, tensors, str(folder))
    return Checkpoint(
        format="hf",
        summary=f"Hugging Face {spec.family}, {kind}",
        spec=spec,
        tensors=canonical,
        companions=companions,
        checked=members_of(torch_files),
        equal=equal,
    )


def to_spec(
    spec: ArchSpec, tensors: Mapping[str, Array], where: str
) -> tuple[dict[str, Array], list[tuple[str, Array, Array]]]:
    """Hugging Face names → checked canonical tensors, and the pairs that must be equal."""
    kept = {n: a for n, a in tensors.items() if not is_derived(n)}
    if kept.keys() <= {p.name for p in iter_params(spec)}:
        return check_shapes(spec, kept, where)  # already canonical: LLaMA's names, or fastllm-train
    rows = name_table(spec)
    if spec.family == "gpt2" and not any(n.startswith("transformer.") for n in kept):
        # OpenAI's own files were saved from the bare model, without the prefix.
        kept = {n if n == "lm_head.weight" else f"transformer.{n}": a for n, a in kept.items()}
    optional: frozenset[str] = frozenset()
    if spec.tied_embeddings:
        rows = [*rows, head_row(spec)]
        optional = frozenset({"lm_head.weight"})
    return check_shapes(spec, from_rows(rows, kept, where, optional=optional), where)


def read_tensors(path: Path) -> tuple[dict[str, Array], list[TorchFile], str]:
    """(name → array, the torch files among the sources, what was found in words)."""
    for index in (SAFE_INDEX, BIN_INDEX):
        if (path / index).is_file():
            return _read_indexed(path, index)
    for single in SINGLE:
        if (path / single).is_file():
            tensors, files = _read_file(path / single)
            return tensors, files, single
    raise UserError(f"{path}: no model.safetensors, no index, no pytorch_model.bin")


def _read_file(file: Path) -> tuple[dict[str, Array], list[TorchFile]]:
    if file.suffix == ".safetensors":
        return read_header(file), []
    from fastllm_convert.files.torch_zip import read_torch

    found = read_torch(file)
    tensors = {k: v for k, v in found.entries.items() if isinstance(v, Array)}
    if len(tensors) != len(found.entries):
        raise UserError(f"{file} holds more than tensors: not a weights file")
    return tensors, [found]


def _read_indexed(path: Path, index: str) -> tuple[dict[str, Array], list[TorchFile], str]:
    weight_map = _weight_map(read_object(path / index), path / index)
    tensors: dict[str, Array] = {}
    torch_files: list[TorchFile] = []
    names = sorted(set(weight_map.values()))
    for name in names:
        file = path / name
        if not file.is_file():
            raise UserError(f"{path / index} names {name}, which is not there")
        found, files = _read_file(file)
        torch_files += files
        for key, array in found.items():
            if weight_map.get(key) != name:
                raise UserError(
                    f"{file} holds {key!r}, which the index places elsewhere or nowhere"
                )
            tensors[key] = array
    absent = [key for key in weight_map if key not in tensors]
    if absent:
        raise UserError(
            f"{path / weight_map[absent[0]]} lacks {absent[0]!r}, which the index names"
        )
    return tensors, torch_files, f"{len(names)} shards"


def _weight_map(index: Mapping[str, Any], where: Path) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UserError(f"{where} has no weight_map")
    weight_map = cast("dict[str, object]", found)
    for name in weight_map.values():
        # A plain file name: no folder, no "..", nothing absolute.
        if not isinstance(name, str) or not name or name in (".", "..") or "\0" in name:
            raise UserError(f"{where}: {name!r} is not a file name")
        if "/" in name or "\\" in name:
            raise UserError(f"{where} points outside its folder: {name!r}")
        if not name.endswith((".safetensors", ".bin")):
            raise UserError(f"{where}: {name!r} is not a weights file")
    return cast("dict[str, str]", weight_map)
