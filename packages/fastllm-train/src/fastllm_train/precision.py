"""Number format of weights, activations and gradients ([precision])."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PrecisionConfig:
    """``bf16`` keeps an fp32 master copy of the weights and fp32 Adam moments."""

    dtype: Literal["fp32", "bf16"] = "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def hf_name(self) -> str:
        """The name in a Hugging Face ``config.json``."""
        return "bfloat16" if self.dtype == "bf16" else "float32"
