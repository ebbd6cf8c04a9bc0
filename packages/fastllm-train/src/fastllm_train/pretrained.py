"""Weights to start from ([model] weights): a Hugging Face folder of safetensors.

Families whose names are the canonical ones (LLaMA, Mistral, Qwen2, Qwen3) are read as they are; so
is a portable checkpoint's folder, of any family.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params
from fastllm_train.errors import UserError
from fastllm_train.portable import INDEX

SINGLE = "model.safetensors"


class PretrainedWeights:
    """Whole fp32 tensors, one at a time. ``UserError`` where the folder is not of this model."""

    def __init__(self, folder: Path, spec: ArchSpec) -> None:
        self._folder = folder
        self._where = self._files()
        wanted = {p.name for p in iter_params(spec) if p.tied_to is None}
        missing = sorted(wanted - self._where.keys())
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} for one",
                hint="LLaMA, Mistral, Qwen2 and Qwen3 are read, whose names are the canonical ones",
            )

    def weight(self, param: ParamSpec) -> torch.Tensor:
        file = self._where[param.name]
        path = self._folder / file
        if Path(file).name != file:
            raise UserError(f"{self._folder / INDEX} names {file!r}, which is no file beside it")
        try:
            with safe_open(path, framework="pt") as handle:
                tensor: torch.Tensor = handle.get_tensor(param.name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {param.name}: {error}") from error
        if tuple(tensor.shape) != param.shape:
            raise UserError(
                f"{path}: {param.name} has shape {list(tensor.shape)}, the model's has "
                f"{list(param.shape)}"
            )
        return tensor.float()

    def _files(self) -> dict[str, str]:
        """The file of every tensor, by name."""
        single, index = self._folder / SINGLE, self._folder / INDEX
        try:
            if index.is_file():
                table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {str(name): str(file) for name, file in table.items()}
            with safe_open(single, framework="pt") as handle:
                return dict.fromkeys(handle.keys(), SINGLE)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise UserError(
                f"{self._folder} holds no readable {INDEX} or {SINGLE}: {error}",
                hint="model.weights is a Hugging Face folder of safetensors",
            ) from error
