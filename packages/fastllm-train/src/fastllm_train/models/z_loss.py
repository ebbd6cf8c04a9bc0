"""The z-loss: coefficient * (log Σ exp logits)², which keeps logits from drifting (PaLM: Chowdhery
et al. 2022, arXiv:2204.02311, section 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm_train.models.kernels import TorchKernels, widened


def loss_with_z(
    logits_NV: Tensor,
    labels_N: Tensor,
    share_N: Tensor,
    coefficient: float,
    first: int = 0,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(Σ share * (cross entropy + coefficient * lse²), Σ share * cross entropy), fp32 (from fp64:
    fp64) scalars. With ``group`` the logits are a rank's, of the vocabulary from ``first`` on.

    lse = cross entropy + the label's logit: so its gradient is the softmax, in any layout.
    """
    losses = TorchKernels().cross_entropy(logits_NV, labels_N, first, group)
    local = labels_N - first
    here = (local >= 0) & (local < logits_NV.shape[-1])
    picked = logits_NV.gather(1, local.masked_fill(~here, 0)[:, None])[:, 0]
    picked = widened(picked).masked_fill(~here, 0.0)
    if group is not None:
        # Imported here: the models themselves know nothing of parallel layouts.
        from fastllm_train.collectives import sum_over_ranks

        picked = sum_over_ranks(picked, group)
    share = share_N.to(losses.dtype)
    cross_entropy = torch.dot(losses, share)
    return cross_entropy + coefficient * torch.dot((losses + picked).square(), share), cross_entropy
