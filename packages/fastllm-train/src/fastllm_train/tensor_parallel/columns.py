"""Column-parallel linear layers of one input, whose gradient travels while theirs are computed.

Each rank's part of the input's gradient has to be added up over the ranks; nothing waits for that
sum but the layer before. So it is started first, and the weights' gradients are computed beside it
(Megatron-LM does the same: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastllm_train.collectives import (
    finish_scatter,
    finish_sum,
    gathered,
    start_scatter,
    start_sum,
)
from fastllm_train.tensor_parallel.layers import SharedLinear


class _Columns(Function):
    """x [B, S, H] (with sequence parallelism [B, S/tp, H]) → x wᵀ + b [B, S, N] for each weight
    [N, H], with its bias [N] or None behind it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
        *parameters: Any,
    ) -> tuple[Tensor, ...]:
        whole = gathered(x, group) if sequence_parallel else x
        weights, biases = parameters[::2], parameters[1::2]
        ctx.group, ctx.sequence_parallel = group, sequence_parallel
        ctx.biased = [bias is not None for bias in biases]
        ctx.save_for_backward(whole, *weights)
        return tuple(F.linear(whole, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        whole, *weights = ctx.saved_tensors
        rows = [grad.flatten(0, -2) for grad in grads]
        total = rows[0] @ weights[0]
        for grad, weight in zip(rows[1:], weights[1:], strict=True):
            total.addmm_(grad, weight)
        total = total.view(whole.shape)
        scatters = ctx.sequence_parallel
        start, finish = (start_scatter, finish_scatter) if scatters else (start_sum, finish_sum)
        under_way = start(total, ctx.group)
        flat = whole.flatten(0, -2)
        of_parameters: list[Tensor | None] = []
        for grad, biased in zip(rows, ctx.biased, strict=True):
            of_parameters += [grad.t() @ flat, grad.sum(dim=0) if biased else None]
        return finish(under_way), None, None, *of_parameters


class ColumnParallel:
    """``Project`` (models.projection) over layers of which each rank holds some columns; the input
    enters the region of cut weights here."""

    def __init__(self, group: dist.ProcessGroup, *, sequence_parallel: bool) -> None:
        self._group, self._sequence_parallel = group, sequence_parallel

    def __call__(self, x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
        parameters: list[Tensor | None] = []
        for layer in layers:
            assert isinstance(layer, nn.Linear | SharedLinear)
            shared = isinstance(layer, SharedLinear)
            parameters += layer.shared() if shared else (layer.weight, layer.bias)
        outputs: tuple[Tensor, ...] = _Columns.apply(  # type: ignore[assignment]
            x, self._group, self._sequence_parallel, *parameters
        )
        return outputs
