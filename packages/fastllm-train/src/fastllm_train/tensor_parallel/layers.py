"""Stand-ins for a model's modules where a rank holds, or sees, only a part.

Each takes over the parameters of the module it replaces, so names do not change.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastllm_train.collectives import sum_gradient
from fastllm_train.models.kernels import widened
from fastllm_train.models.norm import LayerNorm, RMSNorm


class SharedLinear(nn.Module):
    """A linear layer whose ranks hold the same weights and see different work: gradients are
    summed over ``group``."""

    def __init__(self, inner: nn.Linear, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = inner.weight
        self.bias = inner.bias
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.shared())

    def shared(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, for whatever computes with them."""
        bias = None if self.bias is None else sum_gradient(self.bias, self._group)
        return sum_gradient(self.weight, self._group), bias


class PartialLinear(nn.Module):
    """A row-parallel linear layer: the product is a part of a sum, so the bias is not added here
    (``apply`` adds it once, after the sum)."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight = inner.weight
        self.bias = inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SharedNorm(nn.Module):
    """A norm whose ranks see different positions or heads: gradients are summed over ``group``."""

    def __init__(self, inner: RMSNorm | LayerNorm, group: dist.ProcessGroup) -> None:
        super().__init__()
        for name, param in inner.named_parameters():
            self.register_parameter(name, param)
        self._normalise = inner.normalise
        self._group = group

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        shared = [sum_gradient(param, self._group) for param in self.parameters()]
        return self._normalise(x, residual, *shared)


class SharedEmbedding(nn.Module):
    """An embedding of which each rank looks up its part of the sequence (ids [B, S] → [B, S/tp, H])
    and the gradients are summed over ``group``."""

    def __init__(self, inner: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = inner.weight
        self._group = group

    def forward(self, ids: Tensor) -> Tensor:
        mine = ids.chunk(self._group.size(), dim=1)[self._group.rank()]
        return F.embedding(mine, sum_gradient(self.weight, self._group))


class VocabularyEmbedding(nn.Module):
    """Rows ``start …`` of an embedding; tokens outside give zero, the ranks' outputs add up."""

    def __init__(self, inner: nn.Embedding, start: int) -> None:
        super().__init__()
        self.weight = inner.weight
        self._start = start

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self._start
        inside = (local >= 0) & (local < self.weight.shape[0])
        found = F.embedding(local.masked_fill(~inside, 0), self.weight)
        return found.masked_fill(~inside[..., None], 0.0)


class _VocabularyCrossEntropy(Function):
    """-log softmax(logits)[label] with the vocabulary cut over ranks; logits [N, V/tp]."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, start: int, group: dist.ProcessGroup
    ) -> Tensor:
        wide = widened(logits)
        largest = wide.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        shifted = wide - largest[:, None]
        local = labels - start
        inside = (local >= 0) & (local < logits.shape[-1])
        local = local.masked_fill(~inside, 0)
        wanted = shifted.gather(1, local[:, None])[:, 0].masked_fill(~inside, 0.0)
        exponential = shifted.exp()
        sums = torch.stack([exponential.sum(dim=-1), wanted])
        dist.all_reduce(sums, group=group)
        total, wanted = sums
        probability = exponential / total[:, None]
        ctx.save_for_backward(probability, local, inside)
        ctx.dtype = logits.dtype
        return total.log() - wanted

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        probability, local, inside = ctx.saved_tensors
        grad = probability.scatter_add(1, local[:, None], -inside.to(probability.dtype)[:, None])
        return (grad * grads[0][:, None]).to(ctx.dtype), None, None, None


def vocabulary_cross_entropy(
    logits_NV: Tensor, labels_N: Tensor, first: int, group: dist.ProcessGroup
) -> Tensor:
    """``Kernels.cross_entropy`` in plain torch; the logits start at vocabulary row ``first``."""
    losses: Tensor = _VocabularyCrossEntropy.apply(  # type: ignore[assignment]
        logits_NV, labels_N, first, group
    )
    return losses
