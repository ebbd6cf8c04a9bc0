"""Feed-forward layers: gated, plain, and mixtures of gated experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm_planner.arch import ArchSpec, MoeSpec
from fastllm_train.models.kernels import FUSED, TORCH, Kernels, widened
from fastllm_train.models.not_kept import not_kept
from fastllm_train.models.projection import Linear, Project, each


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    recompute_elementwise = False

    def __init__(self, spec: ArchSpec, width: int, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.kernels = kernels
        self.project: Project = each
        self.gate_proj = Linear(spec.hidden, width, spec.mlp_bias, kernels)
        self.up_proj = Linear(spec.hidden, width, spec.mlp_bias, kernels)
        self.down_proj: nn.Module = Linear(width, spec.hidden, spec.mlp_bias, kernels)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute_elementwise and self._in_one(x):
            from fastllm_train.ops.gated_mlp import gated_mlp

            down = self.down_proj.weight
            assert isinstance(down, Tensor)
            return gated_mlp(x, self.gate_proj.weight, self.up_proj.weight, down)
        gate, up = self.project(x, (self.gate_proj, self.up_proj))
        return _through(
            self.down_proj, lambda: self.kernels.swiglu(gate, up), self.recompute_elementwise
        )

    def _in_one(self, x: Tensor) -> bool:
        """Whether all three layers can be one operator: on a CPU, where nothing takes the place of
        a layer or of its weight, or looks at its input or output."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if self.kernels is not FUSED or self.project is not each or not x.is_cpu:
            return False
        for layer in layers:
            hooks = layer._forward_pre_hooks or layer._forward_hooks  # type: ignore[union-attr]
            if type(layer) is not Linear or layer.bias is not None or hooks:
                return False
            if layer.weight.shape != (layer.out_features, layer.in_features):
                return False  # ZeRO-3 holds a part of it
        if torch.is_autocast_enabled("cpu"):
            return False
        from fastllm_train.ops.registration import runs_directly

        return runs_directly((x, *(layer.weight for layer in layers)))


class Gelu(nn.Module):
    """down(gelu(up(x))), gelu by its tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    recompute_elementwise = False

    def __init__(self, spec: ArchSpec, width: int, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.project: Project = each
        self.up_proj = Linear(spec.hidden, width, spec.mlp_bias, kernels)
        self.down_proj: nn.Module = Linear(width, spec.hidden, spec.mlp_bias, kernels)

    def forward(self, x: Tensor) -> Tensor:
        (up,) = self.project(x, (self.up_proj,))
        return _through(
            self.down_proj, lambda: F.gelu(up, approximate="tanh"), self.recompute_elementwise
        )


def _through(
    down: nn.Module, activation: Callable[[], Tensor], recompute_elementwise: bool
) -> Tensor:
    """``down`` of the activation, which is not kept for the backward pass with the switch on."""
    active = activation()
    if not recompute_elementwise or torch.compiler.is_compiling():
        return down(active)
    with not_kept(active, activation):
        return down(active)


class MixtureOfExperts(nn.Module):
    """Each token goes through its ``active_experts`` most probable experts (arXiv:2401.04088).

    Probabilities are a softmax in fp32 over all experts; with ``norm_topk`` the chosen ones are
    divided by their sum. ``balance_loss`` holds the last forward pass's load-balancing loss.
    """

    def __init__(self, spec: ArchSpec, moe: MoeSpec, kernels: Kernels = TORCH) -> None:
        super().__init__()
        self.active = moe.active_experts
        self.norm_topk = moe.norm_topk
        self.router: nn.Module = nn.Linear(spec.hidden, moe.experts, bias=False)
        # Keyed by the expert's index in the whole model: expert parallelism leaves some out.
        self.experts = nn.ModuleDict(
            {str(index): SwiGLU(spec, moe.ffn_hidden, kernels) for index in range(moe.experts)}
        )
        self.balance_loss: Tensor | None = None
        # Parallel layouts put others in their place: how tokens reach experts, and the mean over
        # ranks that hold other tokens of the same micro-batch.
        self.mix: Mix = local_mix
        self.mean_over_ranks: Callable[[Tensor], Tensor] = _itself

    def forward(self, x: Tensor) -> Tensor:
        probability = widened(self.router(x)).softmax(dim=-1)
        weight, chosen = probability.topk(self.active, dim=-1)
        if self.norm_topk:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        self.balance_loss = balance_loss(
            probability.flatten(0, 1), chosen.flatten(0, 1), self.mean_over_ranks
        )
        return self.mix(self.experts, x, weight.to(x.dtype), chosen)


def _itself(x: Tensor) -> Tensor:
    return x


# (experts, x [B, S, H], weight [B, S, k], chosen [B, S, k]) → Σ_k weight_k * expert_k(x), [B, S, H]
Mix = Callable[[nn.ModuleDict, Tensor, Tensor, Tensor], Tensor]


def local_mix(experts: nn.ModuleDict, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
    """``Mix`` where all experts are here."""
    flat, weight, chosen = (tensor.flatten(0, 1) for tensor in (x, weight, chosen))
    out = torch.zeros_like(flat)
    for index, expert in experts.items():
        # An expert without tokens still runs, on none: its gradients are zeros, not missing.
        token, slot = torch.where(chosen == int(index))
        out = out.index_add(0, token, expert(flat[token]) * weight[token, slot, None])
    return out.view_as(x)


def balance_loss(
    probability: Tensor, chosen: Tensor, mean_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """E * Σ_e f_e P_e over a micro-batch (Fedus et al. 2021, arXiv:2101.03961 eq. 4, for top-k).

    probability [tokens, E] fp32, chosen [tokens, k]. f_e: assignments to expert e per token, P_e:
    its mean probability. k when balanced, as in Hugging Face's ``load_balancing_loss_func``.
    """
    experts = probability.shape[-1]
    assigned = F.one_hot(chosen, experts).sum(dim=1).to(probability.dtype)
    share = mean_over_ranks(assigned.mean(dim=0))
    return experts * (share * mean_over_ranks(probability.mean(dim=0))).sum()


def build_mlp(spec: ArchSpec, layer: int, kernels: Kernels = TORCH) -> nn.Module:
    if spec.moe is not None and spec.is_moe_layer(layer):
        return MixtureOfExperts(spec, spec.moe, kernels)
    if spec.mlp == "swiglu":
        return SwiGLU(spec, spec.ffn_hidden, kernels)
    return Gelu(spec, spec.ffn_hidden, kernels)
