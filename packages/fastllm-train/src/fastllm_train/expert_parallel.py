"""Expert parallelism: replicas share out the experts and send each other tokens (GShard: Lepikhin
et al. 2020, arXiv:2006.16668). No token is dropped."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm_train.collectives import exchange_rows
from fastllm_train.mesh import Mesh
from fastllm_train.models.mlp import MixtureOfExperts

GROUP_NAME = "experts"


def expert_range(experts: int, ranks: int, rank: int) -> range:
    """The experts that ``rank`` of ``ranks`` holds."""
    each = experts // ranks
    return range(rank * each, (rank + 1) * each)


def share_out_experts(model: nn.Module, mesh: Mesh) -> None:
    """Leave this rank its experts in every layer, and send tokens to where theirs are."""
    for layer in _layers(model):
        count = len(layer.experts)
        mine = expert_range(count, mesh.parallel.ep, mesh.at.ep)
        layer.experts = nn.ModuleDict({k: e for k, e in layer.experts.items() if int(k) in mine})
        layer.mix = DispatchedMix(count, mesh.expert_group)


def mark_experts(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Tell DeepSpeed that experts' gradients are reduced over the ranks that hold the same ones.

    Returns the module to add to the model: DeepSpeed looks for its own layer type to find out that
    there are experts, and lets it name the process groups.
    """
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    mark_parameters(model)

    class Experts(MoE):
        """Carries no weights."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = next(_layers(model)).router.weight.shape[0]

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            del use_data_before_expert_parallel_
            groups._EXPERT_PARALLEL_GROUP[GROUP_NAME] = mesh.expert_group
            groups._EXPERT_DATA_PARALLEL_GROUP[GROUP_NAME] = mesh.expert_data_group

    return Experts()


def mark_parameters(model: nn.Module) -> None:
    """Experts' parameters get DeepSpeed's attributes of such parameters."""
    for layer in _layers(model):
        for param in layer.experts.parameters():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = GROUP_NAME  # type: ignore[attr-defined]


class DispatchedMix:
    """``Mix`` where the experts, ``count`` in all, are spread over ``group``."""

    def __init__(self, count: int, group: dist.ProcessGroup) -> None:
        self._count, self._group = count, group

    def __call__(self, experts: nn.ModuleDict, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        order = chosen.flatten().argsort(stable=True)  # assignments by expert, so by rank
        token = order // chosen.shape[-1]
        sent, received, by_expert, sizes = self.plan(chosen)
        rows = exchange_rows(flat[token], sent, received, self._group)
        parts = rows[by_expert].split(sizes)  # each expert runs once, on the rows of all ranks
        out = torch.cat([e(part) for e, part in zip(experts.values(), parts, strict=True)])
        back = torch.empty_like(by_expert)
        back[by_expert] = torch.arange(len(by_expert), device=x.device)
        returned = exchange_rows(out[back], received, sent, self._group)
        weighted = returned * weight.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, token, weighted).view_as(x)

    def plan(self, chosen: Tensor) -> tuple[list[int], list[int], Tensor, list[int]]:
        """Rows to send to and to receive from each rank; the received rows' order by expert; rows
        of each expert here. Received rows come by rank, then expert."""
        ranks = self._group.size()
        sent_RE = torch.bincount(chosen.flatten(), minlength=self._count).view(ranks, -1)
        received_RE = torch.empty_like(sent_RE)
        dist.all_to_all_single(received_RE, sent_RE, group=self._group)
        local = torch.arange(received_RE.shape[1], device=chosen.device).repeat(ranks)
        by_expert = local.repeat_interleave(received_RE.flatten()).argsort(stable=True)
        sent, received = (counts.sum(dim=1).tolist() for counts in (sent_RE, received_RE))
        return sent, received, by_expert, received_RE.sum(dim=0).tolist()


def _layers(model: nn.Module) -> Any:
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))
