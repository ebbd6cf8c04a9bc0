"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split pairing.

Channel ``i`` turns together with channel ``i + d/2``, as in Hugging Face's checkpoints. Angles are
computed in fp32 whatever the model's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllm_planner.arch import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position for each channel pair, fp32 [head_dim/2].

    "linear" divides them by ``factor`` (Chen et al. 2023, arXiv:2306.15595). "llama3" keeps short
    wavelengths, divides long ones and blends between (Llama 3.1, arXiv:2407.21783 and the
    ``rope_scaling`` of its published config).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequency = 1.0 / (rope.theta**exponent)
    scaling = rope.scaling_dict
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "llama3":
        factor, low, high = (
            scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor")
        )
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - kept) * frequency / factor + kept * frequency
    return frequency


def rotation(rope: RopeSpec, head_dim: int, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [batch, 1, seq, head_dim], for ``position_ids`` int64 [batch, seq]."""
    frequency = inverse_frequencies(rope, head_dim, position_ids.device)
    angle = position_ids[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [batch, heads, seq, head_dim] by the angles of ``rotation``; dtype is kept."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
