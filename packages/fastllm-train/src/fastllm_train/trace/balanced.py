"""Routing that needs no values: every expert gets the same number of rows.

Fake tensors hold none, so the real routing cannot run on them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllm_train.expert_parallel import DispatchedMix
from fastllm_train.models.mlp import MixtureOfExperts


def balance_routing(model: nn.Module, ranks: int) -> None:
    """Before tensor parallelism wraps the mix. ``ranks``: over which experts are shared out."""
    for layer in model.modules():
        if isinstance(layer, MixtureOfExperts):
            mix = layer.mix
            if isinstance(mix, DispatchedMix):
                mix.plan = lambda chosen, layer=layer: _even_plan(layer, ranks, chosen)
            else:
                layer.mix = _even_local


def _even_plan(
    layer: MixtureOfExperts, ranks: int, chosen: Tensor
) -> tuple[list[int], list[int], Tensor, list[int]]:
    each = chosen.numel() // ranks
    experts = len(layer.experts)
    sizes = [each * ranks // experts] * experts
    sizes[-1] += each * ranks - sum(sizes)
    by_expert = torch.arange(each * ranks, device=chosen.device)
    sent = [each] * ranks
    sent[-1] += chosen.numel() - sum(sent)
    received = list(sent)
    sizes[-1] += sum(received) - sum(sizes)
    by_expert = torch.arange(sum(received), device=chosen.device)
    return sent, received, by_expert, sizes


def _even_local(experts: nn.ModuleDict, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    flat, weight = x.flatten(0, 1), weight.flatten(0, 1)
    out = torch.zeros_like(flat)
    rows = chosen.numel() // len(experts)
    token = torch.arange(rows, device=x.device) % len(flat)
    slot = torch.zeros_like(token)
    for expert in experts.values():
        out = out.index_add(0, token, expert(flat[token]) * weight[token, slot, None])
    return out.view_as(x)
