"""Normalisation layers, in fp32 even when the model is bf16.

Called with a residual they add it first: ``norm(x, residual)`` is (norm(h), h) of h = x + residual.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm_planner.arch import ArchSpec
from fastllm_train.models.kernels import TORCH, Kernels


class RMSNorm(nn.Module):
    """``Kernels.rms_norm`` with its weight [size]."""

    def __init__(self, size: int, eps: float, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return self.normalise(x, residual, self.weight)

    def normalise(
        self, x: Tensor, residual: Tensor | None, weight: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return self.kernels.rms_norm(x, weight, self.eps)
        return self.kernels.add_rms_norm(x, residual, weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return self.normalise(x, residual, self.weight, self.bias)

    def normalise(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        h = x if residual is None else x + residual
        y = F.layer_norm(h, h.shape[-1:], weight, bias, self.eps)
        return y if residual is None else (y, h)


def build_norm(spec: ArchSpec, size: int, kernels: Kernels = TORCH) -> nn.Module:
    if spec.norm == "layernorm":
        return LayerNorm(size, spec.norm_eps)
    return RMSNorm(size, spec.norm_eps, kernels)
