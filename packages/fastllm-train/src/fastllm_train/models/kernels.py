"""The operators a model is made of, beside its matrix products: fused ones, or plain torch.

A model is built over one table of functions. ``torch`` is the reference, in any dtype, and what the
tests compare with; ``fused`` takes the operators of ``fastllm_train.ops`` (fp32, bf16, fp16).

Shapes: B batch, S sequence, A heads, D head width, N tokens, V vocabulary (or a rank's part of it).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Angles(NamedTuple):
    """Rotations of a batch's tokens: ``cos`` and ``sin`` fp32 [B*S, pairs]; ``rows`` int64 [B, S],
    each token's row of them."""

    cos: Tensor
    sin: Tensor
    rows: Tensor


class Kernels(Protocol):
    """One implementation of every operator. Results have the dtype of the first argument."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension (arXiv:1910.07467)."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(h), h) of h = x + residual."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weightᵀ + bias."""
        ...

    def rotate(self, x_BSAD: Tensor, angles: Angles) -> Tensor:
        """Rotary embedding: channel i of a head turns together with channel i + D/2."""
        ...

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up (arXiv:2002.05202)."""
        ...

    def head_loss(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        share_N: Tensor,
        first: int = 0,
        group: Any = None,
    ) -> Tensor:
        """Σ share * -log softmax(hidden weightᵀ)[label], an fp32 (from fp64: fp64) scalar. With
        ``group`` a rank's weight holds the vocabulary from row ``first`` on, and the gradient of
        ``hidden`` is this rank's part of it. ``share`` gets no gradient. One backward pass."""
        ...


def widened(x: Tensor) -> Tensor:
    """fp32, or fp64 when ``x`` is: the type in which sums over many terms are taken."""
    return x if x.dtype == torch.float64 else x.float()


class TorchKernels:
    """The reference: plain torch, operation by operation."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        h = x + residual
        return self.rms_norm(h, weight, eps), h

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def rotate(self, x_BSAD: Tensor, angles: Angles) -> Tensor:
        cos, sin = (table[angles.rows][:, :, None].to(x_BSAD.dtype) for table in angles[:2])
        first, second = x_BSAD.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def head_loss(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        share_N: Tensor,
        first: int = 0,
        group: Any = None,
    ) -> Tensor:
        losses = self.cross_entropy(F.linear(hidden_NH, weight_VH), labels_N, first, group)
        return torch.dot(losses, share_N.to(losses.dtype))

    def cross_entropy(
        self, logits_NV: Tensor, labels_N: Tensor, first: int = 0, group: Any = None
    ) -> Tensor:
        """-log softmax(logits)[label] [N], fp32 (fp64 for fp64 logits)."""
        if group is None:
            return F.cross_entropy(widened(logits_NV), labels_N, reduction="none")
        # Imported here: the models themselves know nothing of parallel layouts.
        from fastllm_train.tensor_parallel.layers import vocabulary_cross_entropy

        return vocabulary_cross_entropy(logits_NV, labels_N, first, group)


class FusedKernels:
    """The operators of fastllm_core. No fp64."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from fastllm_train.ops.rmsnorm import rmsnorm

        return rmsnorm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from fastllm_train.ops.rmsnorm import rmsnorm_residual

        return rmsnorm_residual(x, residual, weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from fastllm_train.ops.matmul import linear

        return linear(x, weight, bias)

    def rotate(self, x_BSAD: Tensor, angles: Angles) -> Tensor:
        from fastllm_train.ops.rope import rope

        return rope(x_BSAD, angles.cos, angles.sin, angles.rows)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        from fastllm_train.ops.glu import swiglu

        return swiglu(gate, up)

    def head_loss(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        share_N: Tensor,
        first: int = 0,
        group: Any = None,
    ) -> Tensor:
        from fastllm_train.ops.cross_entropy import cross_entropy
        from fastllm_train.ops.linear_cross_entropy import linear_cross_entropy_sum

        if hidden_NH.dtype == torch.float16:
            # Small probabilities underflow unless the loss scale is in the gradient already.
            logits = F.linear(hidden_NH, weight_VH)
            losses = cross_entropy(
                logits, labels_N, first=first, group=group, inplace_backward=True
            )
            return torch.dot(losses, share_N.to(losses.dtype))
        return linear_cross_entropy_sum(
            hidden_NH, weight_VH, labels_N, share_N, first=first, group=group
        )


TORCH = TorchKernels()
FUSED = FusedKernels()


def kernels_of(choice: str) -> Kernels:
    """By the name in ``[speed]``."""
    return FUSED if choice == "fused" else TORCH
