"""Linear layer and cross entropy in one, without the logits.

    losses = cross_entropy(hidden @ weight.T, labels)

The vocabulary is taken in pieces: each piece's logits are made, reduced to three numbers a row and
forgotten; the backward pass makes them again (Wijmans et al., "Cut Your Losses in Large-Vocabulary
Language Models", arXiv:2411.09009). One buffer of ``chunk_bytes`` is what is kept of them, where
the plain form keeps ``tokens * vocabulary`` elements several times over; the price is a fourth
matrix product. The weight's gradient is one product over all tokens, and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastllm_core import _core
from fastllm_train.ops.cross_entropy import joined
from fastllm_train.ops.registration import contiguous_capsule, define, stream_of

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    first: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int = 64 << 20,
) -> torch.Tensor:
    """The loss of every token.

    Args:
        hidden: shape ``(..., size)``; float32, bfloat16 or float16.
        weight: shape ``(vocabulary, size)``, the dtype of ``hidden``; with ``group`` this rank's
            rows, tokens ``first .. first + vocabulary - 1``.
        labels: int64, the shape of ``hidden`` without its last dimension.
        ignore_index: tokens with this label have loss 0 and no gradient.
        first: the first token of this rank's rows of ``weight``.
        group: ranks that hold the other rows. The gradient of ``hidden`` is then this rank's part:
            the sum over the group, as behind any column-parallel layer, is the caller's.
        chunk_bytes: size of the logits that exist at a time; at least 256 columns are made.

    Returns:
        float32 losses, the shape of ``labels``. NaN for a label that no rank has.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden has shape {tuple(hidden.shape)} and weight"
            f" {tuple(weight.shape)}, expected (..., size) and (vocabulary, size)"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy: weight is {weight.dtype}, expected {hidden.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: labels has shape {tuple(labels.shape)},"
            f" expected {tuple(hidden.shape[:-1])}"
        )
    losses: torch.Tensor = _LinearCrossEntropy.apply(
        hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None],
        weight,
        labels.flatten(),
        ignore_index,
        first,
        group,
        chunk_bytes,
    )
    return losses.view(labels.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        ignore: int,
        first: int,
        group: dist.ProcessGroup | None,
        chunk_bytes: int,
    ) -> torch.Tensor:
        parts = _fwd(hidden, weight, labels, first, ignore, chunk_bytes)
        columns = (first, first + weight.shape[0])
        losses, lse = joined(parts, labels, columns, ignore, group)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.ignore, ctx.first, ctx.chunk_bytes = ignore, first, chunk_bytes
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        dhidden, dweight = _bwd(
            hidden, weight, labels, lse, gradients[0], ctx.first, ctx.ignore, ctx.chunk_bytes,
            ctx.needs_input_grad[0], ctx.needs_input_grad[1],
        )  # fmt: skip
        return (
            dhidden if ctx.needs_input_grad[0] else None,
            dweight if ctx.needs_input_grad[1] else None,
            *(None,) * 5,
        )


class _Logits:
    """Logits of consecutive columns in one buffer, which each piece overwrites."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, chunk_bytes: int) -> None:
        self.hidden, self.weight = hidden, weight
        self.rows, self.cols = hidden.shape[0], weight.shape[0]
        row_bytes = max(1, self.rows * hidden.element_size())
        self.step = max(1, min(self.cols, max(256, chunk_bytes // row_bytes)))
        self._buffer = hidden.new_empty(self.rows * self.step)

    def __iter__(self) -> Any:
        """Yields the first column, the rows of the weight, and their logits."""
        for begin in range(0, self.cols, self.step):
            part = self.weight[begin : begin + self.step]
            logits = self._buffer[: self.rows * part.shape[0]].view(self.rows, part.shape[0])
            torch.mm(self.hidden, part.t(), out=logits)
            yield begin, part, logits


def _fwd_kernel(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    first: int,
    ignore: int,
    chunk_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    parts = largest, total, target = _fwd_fake(hidden, weight, labels, first, ignore, chunk_bytes)
    for begin, _, logits in _Logits(hidden.detach(), weight.detach(), chunk_bytes):
        _core.cross_entropy_fwd(
            contiguous_capsule(logits),
            contiguous_capsule(labels),
            contiguous_capsule(largest),
            contiguous_capsule(total),
            contiguous_capsule(target),
            first + begin,
            ignore,
            begin > 0,
            stream_of(logits),
        )
    return parts


def _fwd_fake(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def per_row() -> torch.Tensor:
        return hidden.new_empty(hidden.shape[0], dtype=torch.float32)

    return per_row(), per_row(), per_row()


def _bwd_kernel(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    first: int,
    ignore: int,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, dloss = hidden.detach(), weight.detach(), dloss.float()
    dhidden, dweight = _bwd_fake(
        hidden, weight, labels, lse, dloss, first, ignore, chunk_bytes, need_hidden, need_weight
    )
    # The pieces' shares of dhidden are added in float32.
    total = torch.zeros(dhidden.shape, dtype=torch.float32, device=hidden.device)
    for begin, part, logits in _Logits(hidden, weight, chunk_bytes):
        _core.cross_entropy_bwd(
            contiguous_capsule(logits),
            contiguous_capsule(labels),
            contiguous_capsule(lse),
            contiguous_capsule(dloss),
            contiguous_capsule(logits),
            first + begin,
            ignore,
            stream_of(logits),
        )
        if need_weight:
            torch.mm(logits.t(), hidden, out=dweight[begin : begin + part.shape[0]])
        if need_hidden and hidden.dtype == torch.float32:
            total.addmm_(logits, part)
        elif need_hidden:
            total += logits @ part
    return total if hidden.dtype == torch.float32 else dhidden.copy_(total), dweight


def _bwd_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    first: int,
    ignore: int,
    chunk_bytes: int,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    # What is not needed has no elements.
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if need_weight else (0, weight.shape[1])),
    )


_fwd = define(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor labels, int first, int ignore,"
    " int chunk_bytes) -> (Tensor max, Tensor sum, Tensor target)",
    _fwd_kernel,
    _fwd_fake,
)
_bwd = define(
    "linear_cross_entropy_bwd(Tensor hidden, Tensor weight, Tensor labels, Tensor lse,"
    " Tensor dloss, int first, int ignore, int chunk_bytes, bool need_hidden, bool need_weight)"
    " -> (Tensor dhidden, Tensor dweight)",
    _bwd_kernel,
    _bwd_fake,
)
