"""Which model is trained ([model]): a preset, a Hugging Face config or an inline table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllm_planner.arch import ArchError, ArchSpec, preset, read_hf_config, spec_from_dict
from fastllm_train.errors import UserError

SOURCES = ("preset", "hf_config", "arch")


@dataclass(frozen=True)
class ModelConfig:
    """Exactly one of ``preset``, ``hf_config`` (a file or folder) and ``arch`` is set.

    ``weights``: a Hugging Face folder to start from; without it weights are drawn at random.
    """

    preset: str = ""
    hf_config: str = ""
    arch: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""

    def __post_init__(self) -> None:
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) != 1:
            what = " and ".join(f"model.{name}" for name in given) or "none"
            raise UserError(
                f"the model must be given once; found: {what}",
                hint='set one of model.preset="llama-10m", model.hf_config="…/config.json" '
                "or a [model.arch] table",
            )

    def resolve(self) -> ArchSpec:
        """The architecture. ``UserError`` for an unknown name or an impossible one."""
        try:
            if self.preset:
                return preset(self.preset)
            if self.hf_config:
                return read_hf_config(Path(self.hf_config))
            return spec_from_dict(self.arch)
        except ArchError as error:
            raise UserError(f"model: {error}", hint=error.hint) from error
