"""One stage of a model: some of its layers, the embedding on the first, the head on the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fastllm_train.models.decoder import TrainingModel


class StageOutput(NamedTuple):
    """``objective``: a scalar whose backward pass is the stage's: on the last stage the loss, on
    others a stand-in that starts from the gradient which the next stage sends. ``cross_entropy``
    as in ``Loss``, zero but on the last. ``hidden``: what goes to the next stage, no gradient."""

    objective: Tensor
    cross_entropy: Tensor
    hidden: Tensor


class _Handoff(Function):
    """0, with the gradient that ``take()`` gives: the stage's part of a backward pass starts here.

    The gradient handed in from above is ignored: the one that arrived is of the scaled loss.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, take: Callable[[], Tensor]) -> Tensor:
        ctx.take = take
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del grads
        return ctx.take(), None


def cut_to_stage(model: TrainingModel, layers: range, *, first: bool, last: bool) -> None:
    """Remove what other stages hold. The names of what stays do not change."""
    trunk = model.model
    trunk.layers = nn.ModuleDict({k: m for k, m in trunk.layers.items() if int(k) in layers})
    if not first:
        del trunk.embed_tokens
        if model.spec.position == "learned":
            del trunk.embed_positions
    if not last:
        del trunk.norm
        del model.lm_head


class PipelineStage(nn.Module):
    """A cut ``TrainingModel`` with its parameter names, run stage by stage."""

    def __init__(self, part: TrainingModel, *, first: bool, last: bool) -> None:
        super().__init__()
        self.spec = part.spec
        self.model = part.model
        if last:
            self.lm_head = part.lm_head
        self._part = [part]  # not a submodule: its parameters are ours already
        self._first, self._last = first, last

    def forward(
        self,
        received: Tensor | None,
        tokens: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        take: Callable[[], Tensor],
    ) -> StageOutput:
        """``received``: hidden states of the stage before (None on the first). ``take`` gives the
        gradient of ``hidden`` when it is needed."""
        (part,) = self._part
        x = self.model.embed(tokens, position_ids) if self._first else received
        assert x is not None
        x = self.model.run_layers(x, position_ids)
        cross_entropy = torch.zeros((), device=x.device)
        if self._last:
            objective, cross_entropy = part.head_loss(self.model.norm(x), labels, loss_mask)
        else:
            objective = _Handoff.apply(x, take)
        balance = part.balance_loss(loss_mask)
        if balance is not None:
            objective = objective + balance
        return StageOutput(objective, cross_entropy.detach(), x.detach())  # type: ignore[arg-type]
