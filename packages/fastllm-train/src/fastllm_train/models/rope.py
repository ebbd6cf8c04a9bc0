"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split pairing.

Channel ``i`` turns together with channel ``i + d/2``, as in Hugging Face's checkpoints. Angles are
computed in fp32 whatever the model's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastllm_planner.arch import RopeSpec
from fastllm_train.models.kernels import Angles


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


def rotation(rope: RopeSpec, head_dim: int, position_ids: Tensor) -> Angles:
    """The angles of ``position_ids`` int64 [B, S], a row per token (packed documents start again at
    position 0, and a table up to the largest position could be far longer than the batch)."""
    frequency = inverse_frequencies(rope, head_dim, position_ids.device)
    angle = position_ids.flatten()[:, None].float() * frequency
    rows = torch.arange(position_ids.numel(), device=position_ids.device)
    return Angles(angle.cos(), angle.sin(), rows.view(position_ids.shape))
