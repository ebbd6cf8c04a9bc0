"""Number format of weights, activations and gradients ([precision])."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastllm_train.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PrecisionConfig:
    """``bf16`` and ``fp16`` keep fp32 masters of the weights and fp32 Adam moments.

    ``masters`` (bf16, torch engine): "split" keeps of a master only what its bf16 weight does not
    say, 16 bits, instead of "whole" ones beside the weights: 2 bytes a parameter less, the same
    masters to the bit. "auto" splits where it can.

    fp16 scales the loss, so that small gradients do not vanish: by ``loss_scale`` at first. The
    update of a step whose gradients overflow is left out; from the ``loss_scale_hysteresis``-th of
    them on each halves the scale, and ``loss_scale_window`` steps without one double it
    (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2).

    ``accumulate`` (bf16): the type in which micro-batches' gradients are added up, that of the
    model or "fp32" (then every rank keeps its ZeRO share of them in fp32).
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: Literal["model", "fp32"] = "model"
    masters: Literal["auto", "split", "whole"] = "auto"
    loss_scale: int = 65536
    loss_scale_window: int = 1000
    loss_scale_hysteresis: int = 2
    min_loss_scale: int = 1

    def __post_init__(self) -> None:
        if self.dtype == "fp16" and self.accumulate == "fp32":
            raise UserError(
                'precision.accumulate="fp32" is not for fp16 in this version',
                hint='set precision.dtype="bf16", or precision.accumulate="model"',
            )
        if self.masters == "split" and self.dtype != "bf16":
            raise UserError(
                f'precision.masters="split" is for bf16, the upper half of fp32, not {self.dtype}',
                hint='set precision.dtype="bf16", or precision.masters="auto"',
            )
        power = math.log2(self.loss_scale) if self.loss_scale > 0 else 0.5
        if power != int(power):
            raise UserError(f"precision.loss_scale={self.loss_scale} is not a power of two")
        for name in ("loss_scale_window", "loss_scale_hysteresis", "min_loss_scale"):
            if getattr(self, name) < 1:
                raise UserError(f"precision.{name}={getattr(self, name)} is below 1")
        if self.loss_scale < self.min_loss_scale:
            raise UserError(
                f"precision.loss_scale={self.loss_scale} is below precision.min_loss_scale"
            )

    @property
    def separate_sums(self) -> bool:
        """Whether gradients are added up in another type than they are made in."""
        return self.dtype == "bf16" and self.accumulate == "fp32"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]

    @property
    def hf_name(self) -> str:
        """The name in a Hugging Face ``config.json``."""
        return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.dtype]
