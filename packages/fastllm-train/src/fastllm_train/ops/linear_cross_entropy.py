"""Linear layer and cross entropy in one, without the logits.

    losses = cross_entropy(hidden @ weight.T, labels)

:func:`linear_cross_entropy` gives the loss of every token. The vocabulary is taken in pieces: each
piece's logits are made, reduced to three numbers a row and forgotten; the backward pass makes them
again (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009). One
buffer of ``chunk_bytes`` is what is kept of them, where the plain form keeps ``tokens *
vocabulary`` elements several times over; the price is a fourth matrix product. The weight's
gradient is one product over all tokens, and rounded once.

:func:`linear_cross_entropy_sum` gives Σ share * loss for shares known beforehand, as training has
them. The tokens are taken in pieces, and each piece's gradients are made in the forward pass,
while its logits are there: three products, as in the plain form (Hsu et al., "Liger Kernel",
arXiv:2410.10989, 3.2). What lives until the backward pass are the two gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastllm_core import _core
from fastllm_train.ops.cross_entropy import become_gradient_, joined, losses_of
from fastllm_train.ops.matmul import multiply_
from fastllm_train.ops.registration import contiguous_capsule, define, stream_of

__all__ = ["linear_cross_entropy", "linear_cross_entropy_sum"]


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
    _check("linear_cross_entropy", hidden, weight, labels)
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


def linear_cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    share: torch.Tensor,
    *,
    ignore_index: int = -100,
    first: int = 0,
    group: dist.ProcessGroup | None = None,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """Σ share * loss over the tokens: a float32 scalar. One backward pass; ``share`` gets no
    gradient. Other arguments and errors as for :func:`linear_cross_entropy`.

    Args:
        share: float32, the shape of ``labels``.
        chunk_bytes: size of the logits that exist at a time, at least a row. By default 64 MiB;
            128 in float16 and bfloat16, where the weight's gradient from several pieces is added up
            in a float32 buffer of its own.
    """
    if chunk_bytes is None:
        chunk_bytes = (64 if hidden.dtype == torch.float32 else 128) << 20
    _check("linear_cross_entropy_sum", hidden, weight, labels)
    if share.shape != labels.shape:
        raise ValueError(
            f"linear_cross_entropy_sum: share has shape {tuple(share.shape)},"
            f" expected {tuple(labels.shape)}"
        )
    graded = torch.is_grad_enabled()
    total: torch.Tensor = _WeightedSum.apply(
        hidden.flatten(0, -2) if hidden.dim() > 1 else hidden[None],
        weight,
        labels.flatten(),
        share.detach().flatten().float(),
        (graded and hidden.requires_grad, graded and weight.requires_grad),
        ignore_index,
        first,
        group,
        chunk_bytes,
    )
    return total


def _check(name: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden has shape {tuple(hidden.shape)} and weight"
            f" {tuple(weight.shape)}, expected (..., size) and (vocabulary, size)"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{name}: weight is {weight.dtype}, expected {hidden.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name}: labels has shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:-1])}"
        )


class _WeightedSum(torch.autograd.Function):
    """Made of operators that the dispatcher sees, so that a memory trace sees the pieces."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        share: torch.Tensor,
        need: tuple[bool, bool],
        ignore: int,
        first: int,
        group: dist.ProcessGroup | None,
        chunk_bytes: int,
    ) -> torch.Tensor:
        rows, row_bytes = hidden.shape[0], max(1, weight.shape[0] * hidden.element_size())
        pieces = -(-rows // max(1, chunk_bytes // row_bytes))
        step = max(1, -(-rows // max(1, pieces)))
        buffer = hidden.new_empty(min(step, rows), weight.shape[0])
        dhidden = hidden.new_empty(hidden.shape) if need[0] else None
        dweight = _WeightGradient(weight, rows > step) if need[1] else None
        losses: list[torch.Tensor] = []
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            logits = buffer[: part.stop - begin]
            multiply_(logits, hidden[part], weight.t())
            piece, lse = losses_of(logits, labels[part], ignore, first, group)
            losses.append(piece)
            if dhidden is not None or dweight is not None:
                become_gradient_(logits, labels[part], lse, share[part], ignore, first)
            if dhidden is not None:
                multiply_(dhidden[part], logits, weight)
            if dweight is not None:
                dweight.add(logits, hidden[part])
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.result())
        return torch.dot(torch.cat(losses), share) if losses else share.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        dhidden, dweight = ctx.saved_tensors
        for gradient in (dhidden, dweight):
            if gradient is not None:
                gradient.mul_(gradients[0])
        return dhidden, dweight, *(None,) * 7


class _WeightGradient:
    """Σ dlogitsᵀ hidden over pieces of the tokens, rounded to the weight's dtype once."""

    def __init__(self, weight: torch.Tensor, several: bool) -> None:
        self._dtype = weight.dtype
        wide = several and weight.dtype != torch.float32
        self._sum = weight.new_empty(weight.shape, dtype=torch.float32) if several else None
        self._part = None if several and not wide else weight.new_empty(weight.shape)
        self._added = False

    def add(self, dlogits: torch.Tensor, hidden: torch.Tensor) -> None:
        if self._part is None:
            assert self._sum is not None
            multiply_(self._sum, dlogits.t(), hidden, accumulate=self._added)
        else:
            multiply_(self._part, dlogits.t(), hidden)
            if self._sum is not None:
                self._sum.add_(self._part) if self._added else self._sum.copy_(self._part)
        self._added = True

    def result(self) -> torch.Tensor:
        if self._sum is None:
            assert self._part is not None
            return self._part
        return self._sum if self._part is None else self._part.copy_(self._sum)


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
            multiply_(logits, self.hidden, part.t())
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
            multiply_(dweight[begin : begin + part.shape[0]], logits.t(), hidden)
        if need_hidden and hidden.dtype == torch.float32:
            multiply_(total, logits, part, accumulate=True)
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
