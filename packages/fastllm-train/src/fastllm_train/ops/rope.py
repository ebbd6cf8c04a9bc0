"""Rotary position embedding (Su et al., arXiv:2104.09864) of one tensor, with given angles.

The first channels of every head turn in pairs by the angle of their token, computed in float32 and
rounded once; the gradient turns back (formulas in ``cpp/include/fastllm/rope.hpp``).
"""

from __future__ import annotations

from typing import Any

import torch

from fastllm_core import _core
from fastllm_train.ops.registration import (
    capsule,
    contiguous_capsule,
    define_differentiable,
    stream_of,
)

__all__ = ["rope"]


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Turns pairs of channels of ``x``.

    Args:
        x: shape ``(batch, tokens, heads, head_dim)``; float32, bfloat16 or float16. A transposed
            view, such as of ``(batch, heads, tokens, head_dim)``, is not copied as long as channels
            are adjacent; the result has its strides.
        cos: float32, shape ``(rows, pairs)`` with ``2 * pairs <= head_dim``; channels from
            ``2 * pairs`` on are copied. Gets no gradient.
        sin: likewise.
        positions: int64, shape ``(batch, tokens)``: each token's row of the tables, which serves
            offsets and packed sequences. A row outside of the tables gives NaN. Without it token s
            takes row s.
        interleaved: pairs are channels ``(2i, 2i + 1)``; otherwise ``(i, i + pairs)``, as in
            Hugging Face's checkpoints.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _rope(x, cos, sin, positions, interleaved, False)


def _adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def _result(x: torch.Tensor) -> torch.Tensor:
    # With the strides of x if it is dense, contiguous if not.
    return torch.empty_like(_adjacent(x), memory_format=torch.preserve_format)


def _kernel(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    y = _result(x)
    _core.rope(
        capsule(_adjacent(x)),
        contiguous_capsule(cos),
        contiguous_capsule(sin),
        None if positions is None else contiguous_capsule(positions),
        capsule(y),
        interleaved,
        inverse,
        stream_of(x),
    )
    return y


def _fake(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> torch.Tensor:
    return _result(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    cos, sin, positions = ctx.saved_tensors
    dx = _rope(dy, cos, sin, positions, ctx.interleaved, not ctx.inverse)
    return dx, None, None, None, None, None


_rope = define_differentiable(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse)"
    " -> Tensor",
    _kernel,
    _fake,
    _setup,
    _backward,
)
