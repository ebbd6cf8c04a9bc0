"""Feed-forward layers: gated, plain, and mixtures of gated experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm_planner.arch import ArchSpec, MoeSpec
from fastllm_train.models.norm import widened


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, spec: ArchSpec, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden, width, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.hidden, width, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(width, spec.hidden, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gelu(nn.Module):
    """down(gelu(up(x))), gelu by its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, spec: ArchSpec, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(spec.hidden, width, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(width, spec.hidden, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class MixtureOfExperts(nn.Module):
    """Each token goes through its ``active_experts`` most probable experts (arXiv:2401.04088).

    Probabilities are a softmax in fp32 over all experts; with ``norm_topk`` the chosen ones are
    divided by their sum. ``balance_loss`` holds the last forward pass's load-balancing loss.
    """

    def __init__(self, spec: ArchSpec, moe: MoeSpec) -> None:
        super().__init__()
        self.active = moe.active_experts
        self.norm_topk = moe.norm_topk
        self.router = nn.Linear(spec.hidden, moe.experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(spec, moe.ffn_hidden) for _ in range(moe.experts))
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        probability = widened(self.router(flat)).softmax(dim=-1)
        weight, chosen = probability.topk(self.active, dim=-1)
        if self.norm_topk:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        weight = weight.to(x.dtype)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            # An expert without tokens still runs, on none: its gradients are zeros, not missing.
            token, slot = torch.where(chosen == index)
            out = out.index_add(0, token, expert(flat[token]) * weight[token, slot, None])
        self.balance_loss = balance_loss(probability, chosen)
        return out.view_as(x)


def balance_loss(probability: Tensor, chosen: Tensor) -> Tensor:
    """E * Σ_e f_e P_e over a micro-batch (Fedus et al. 2021, arXiv:2101.03961 eq. 4, for top-k).

    probability [tokens, E] fp32, chosen [tokens, k]. f_e: assignments to expert e per token, P_e:
    its mean probability. k when balanced, as in Hugging Face's ``load_balancing_loss_func``.
    """
    experts = probability.shape[-1]
    assigned = F.one_hot(chosen, experts).sum(dim=1).to(probability.dtype)
    return experts * (assigned.mean(dim=0) * probability.mean(dim=0)).sum()


def build_mlp(spec: ArchSpec, layer: int) -> nn.Module:
    if spec.moe is not None and spec.is_moe_layer(layer):
        return MixtureOfExperts(spec, spec.moe)
    kind = SwiGLU if spec.mlp == "swiglu" else Gelu
    return kind(spec, spec.ffn_hidden)
