"""Moving tokens to their experts and back (Gale et al., "MegaBlocks", arXiv:2211.15841).

    route = moe_route(experts, num_experts)              # which place each copy of a token takes
    y = moe_permute(x, route.slots, route.places)        # rows ordered by expert
    ... one matrix product per expert, over route.counts rows ...
    out = moe_combine(y, route.slots, weights)           # each token's weighted sum

Copies of a token are added in float32 in the order of its choices, without atomic operations, so
results are the same bits from run to run (formulas in ``cpp/include/fastllm/moe_permute.hpp``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastllm_core import _core
from fastllm_train.ops.registration import (
    contiguous_capsule,
    define,
    define_differentiable,
    optional_capsule,
    stream_of,
)

__all__ = ["Route", "moe_combine", "moe_permute", "moe_route"]


class Route(NamedTuple):
    """Places of tokens, ordered by expert; within an expert by token, then by choice."""

    slots: torch.Tensor  # int64 (tokens, choices): place of each copy, -1 where it was dropped
    counts: torch.Tensor  # int64 (experts,): places of each expert, one expert after the other
    places: int  # all of them


def moe_route(experts: torch.Tensor, num_experts: int, capacity: int | None = None) -> Route:
    """Gives each choice of each token a place.

    Args:
        experts: int64, shape ``(tokens, choices)``, each from 0 to ``num_experts - 1``.
        num_experts: how many there are.
        capacity: places of every expert. What does not fit is dropped, the last tokens first;
            places that nothing takes stay. Without it each expert has as many as were chosen.

    Raises:
        ValueError: ``experts`` has not two dimensions or is not int64.
    """
    if experts.dim() != 2 or experts.dtype != torch.int64:
        raise ValueError("moe_route: experts is not int64 of shape (tokens, choices)")
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    slots = torch.empty_like(flat)
    places = torch.arange(flat.numel(), device=flat.device)
    if capacity is None:
        slots[order] = places
        return Route(slots.view_as(experts), counts, flat.numel())
    sorted_experts = flat[order]
    rank = places - (counts.cumsum(0) - counts)[sorted_experts]
    fits = rank < capacity
    slots[order] = torch.where(fits, sorted_experts * capacity + rank, -1)
    full = torch.full_like(counts, capacity)
    return Route(slots.view_as(experts), full, num_experts * capacity)


def moe_permute(x: torch.Tensor, slots: torch.Tensor, places: int) -> torch.Tensor:
    """Copies rows to their places.

    Args:
        x: shape ``(tokens, cols)``; float32, bfloat16 or float16, on the CPU or a CUDA device.
        slots: int64, shape ``(tokens, choices)``, no two the same; negative: no copy.
        places: rows of the result.

    Returns:
        Shape ``(places, cols)``; 0 where no slot is.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _permute(x, slots, places)


def moe_combine(
    y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Each token's sum of its rows.

    Args:
        y: shape ``(places, cols)``; float32, bfloat16 or float16.
        slots: int64, shape ``(tokens, choices)``; negative: nothing is added.
        weights: float32, the shape of ``slots``; None for 1.

    Returns:
        Shape ``(tokens, cols)``, the dtype of ``y``.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return _combine(y, slots, weights)


def _places(of: torch.Tensor, places: int, slots: torch.Tensor) -> torch.Tensor:
    # The kernel leaves alone what no slot names. Whether there are such places is worth asking on
    # the CPU; the answer of a GPU would have to be waited for. In one pass: of 2,048 slots
    # (slots >= 0).all() takes 10 microseconds, the minimum 1.5.
    full = places == slots.numel() and slots.device.type == "cpu"
    full = full and (places == 0 or int(slots.min()) >= 0)
    make = torch.empty if full else torch.zeros
    return make((places, of.shape[1]), dtype=of.dtype, device=of.device)


def _permute_kernel(x: torch.Tensor, slots: torch.Tensor, places: int) -> torch.Tensor:
    y = _places(x, places, slots)
    _core.moe_permute(
        contiguous_capsule(slots), contiguous_capsule(x), contiguous_capsule(y), stream_of(x)
    )
    return y


def _permute_fake(x: torch.Tensor, slots: torch.Tensor, places: int) -> torch.Tensor:
    return x.new_empty((places, x.shape[1]))


def _combine_kernel(
    y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    out = _combine_fake(y, slots, weights)
    _core.moe_combine(
        contiguous_capsule(slots),
        optional_capsule(weights),
        contiguous_capsule(y),
        contiguous_capsule(out),
        stream_of(y),
    )
    return out


def _combine_fake(
    y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    return y.new_empty((slots.shape[0], y.shape[1]))


def _combine_bwd_kernel(
    dout: torch.Tensor, y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dy = _places(y, y.shape[0], slots)
    dweights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    _core.moe_combine_bwd(
        contiguous_capsule(slots),
        contiguous_capsule(weights),
        contiguous_capsule(dout),
        contiguous_capsule(y),
        contiguous_capsule(dy),
        contiguous_capsule(dweights),
        stream_of(y),
    )
    return dy, dweights


def _combine_bwd_fake(
    dout: torch.Tensor, y: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


_combine_bwd = define(
    "moe_combine_bwd(Tensor dout, Tensor y, Tensor slots, Tensor weights)"
    " -> (Tensor dy, Tensor dweights)",
    _combine_bwd_kernel,
    _combine_bwd_fake,
)


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _permute_backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    (slots,) = ctx.saved_tensors
    return _combine(dy, slots, None), None, None


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    y, slots, weights = inputs
    ctx.places = y.shape[0]
    if weights is None:
        ctx.save_for_backward(slots)
    else:
        ctx.save_for_backward(slots, weights, y)


def _combine_backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
    if len(ctx.saved_tensors) == 1:
        return _permute(dout, ctx.saved_tensors[0], ctx.places), None, None
    slots, weights, y = ctx.saved_tensors
    dy, dweights = _combine_bwd(dout, y, slots, weights)
    return dy, None, dweights


_permute = define_differentiable(
    "moe_permute(Tensor x, Tensor slots, int places) -> Tensor",
    _permute_kernel,
    _permute_fake,
    _permute_setup,
    _permute_backward,
)
_combine = define_differentiable(
    "moe_combine(Tensor y, Tensor slots, Tensor? weights) -> Tensor",
    _combine_kernel,
    _combine_fake,
    _combine_setup,
    _combine_backward,
)
