"""Layout-free checkpoints (checkpoint.format = "portable"): whole tensors by canonical name.

A folder ``global_step<N>`` holds, from each rank, a share of the tensors:

    model-00001-of-00004.safetensors      fp32 master weights, canonical names
    optimizer-00001-of-00004.safetensors  "<moment>/<canonical name>", fp32
    model.safetensors.index.json          which file holds which weight, as Hugging Face writes it
    config.json                           Hugging Face config
    state.json                            step, consumed samples, optimizer steps, resolved config

No file is a pickle. Any layout (data, tensor parallel size, ZeRO stage) loads any other's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params, to_hf_config
from fastllm_train.errors import UserError

STATE = "state.json"
INDEX = "model.safetensors.index.json"
SCHEMA = 1


@dataclass(frozen=True)
class WholeState:
    """One parameter of the training state: fp32 CPU tensors of the parameter's whole shape."""

    name: str
    weight: torch.Tensor
    moments: Mapping[str, torch.Tensor]


def is_portable(folder: Path) -> bool:
    return (folder / STATE).is_file()


def file_names(rank: int, world_size: int) -> tuple[str, str]:
    """Files of rank ``rank``: weights and moments."""
    tail = f"{rank + 1:05d}-of-{world_size:05d}.safetensors"
    return f"model-{tail}", f"optimizer-{tail}"


def write_share(folder: Path, share: Iterable[WholeState], rank: int, world_size: int) -> None:
    """Write the parameters that ``rank`` owns, and flush them to disk. ``OSError`` if it fails."""
    weights: dict[str, torch.Tensor] = {}
    moments: dict[str, torch.Tensor] = {}
    for state in share:
        weights[state.name] = state.weight.contiguous()
        moments |= {f"{k}/{state.name}": m.contiguous() for k, m in state.moments.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in zip(file_names(rank, world_size), (weights, moments), strict=True):
        try:
            save_file(tensors, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"{folder / name}: {error}") from error
        with (folder / name).open("rb") as handle:
            os.fsync(handle.fileno())


def write_description(
    folder: Path,
    spec: ArchSpec,
    state: Mapping[str, Any],
    owners: Mapping[str, int],
    world_size: int,
) -> None:
    """Index, config and state: one rank writes them."""
    where = {name: file_names(owner, world_size)[0] for name, owner in owners.items()}
    total = sum(4 * p.numel for p in iter_params(spec) if p.tied_to is None)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    for name, content in (
        (INDEX, index),
        ("config.json", to_hf_config(spec, dtype="float32")),
        (STATE, {"schema": SCHEMA, **state}),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


class PortableCheckpoint:
    """Reads a portable checkpoint tensor by tensor. ``UserError`` for one that does not fit."""

    def __init__(self, folder: Path, spec: ArchSpec) -> None:
        self.folder = folder
        self._shapes = {p.name: p.shape for p in iter_params(spec)}
        try:
            self.state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._where = {str(k): str(v) for k, v in index["weight_map"].items()}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder} is not a readable checkpoint: {error}") from error
        if self.state.get("schema") != SCHEMA:
            raise UserError(f"{folder / STATE} has schema {self.state.get('schema')!r}")
        wanted = {p.name for p in iter_params(spec) if p.tied_to is None}
        if wanted != self._where.keys():
            names = ", ".join(sorted(wanted ^ self._where.keys())[:3])
            raise UserError(f"{folder} is of another model: they differ in {names}")

    def weight(self, param: ParamSpec) -> torch.Tensor:
        """The whole fp32 weight."""
        return self._read(self._where[param.name], param.name, param.name)

    def moments(self, param: ParamSpec, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """The optimizer's moments of a parameter."""
        file = self._where[param.name].replace("model-", "optimizer-", 1)
        return {key: self._read(file, f"{key}/{param.name}", param.name) for key in keys}

    def _read(self, file: str, key: str, name: str) -> torch.Tensor:
        path = self.folder / file
        if Path(file).name != file:
            raise UserError(f"{self.folder / INDEX} names {file!r}, which is no file beside it")
        try:
            with safe_open(path, framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {key}: {error}") from error
        if tuple(tensor.shape) != self._shapes[name] or tensor.dtype != torch.float32:
            raise UserError(
                f"{path}: {key} is {tensor.dtype} of shape {list(tensor.shape)}, expected float32 "
                f"of {list(self._shapes[name])}"
            )
        return tensor
