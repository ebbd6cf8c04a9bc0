"""Feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastllm_planner.arch import ArchSpec


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, spec: ArchSpec, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden, width, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden, width, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(width, spec.hidden, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
