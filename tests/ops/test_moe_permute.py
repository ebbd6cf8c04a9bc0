"""Tokens to experts and back, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.moe_permute import moe_combine, moe_permute, moe_route

from .accuracy import DTYPES, assert_within, randoms, rounded
from .random_inputs import CPU, RandomCase, random_cases

SHAPES = ((1, 1, 1), (9, 2, 33), (13, 3, 512), (4, 2, 1000), (3, 2, 5000), (5, 19, 70))


def routing(tokens: int, choices: int) -> tuple[torch.Tensor, int]:
    """Places in no order, one token's copy dropped, one place left free."""
    generator = torch.Generator().manual_seed(tokens)
    places = tokens * choices + 1
    slots = torch.randperm(places, generator=generator)[: tokens * choices].view(tokens, choices)
    if tokens > 1:
        slots[1, -1] = -1
    return slots, places


def check_permute(backend: Any, slots: torch.Tensor, places: int, x: torch.Tensor) -> None:
    # What is not written stays.
    expected = torch.full((places, x.shape[1]), 7.0, dtype=x.dtype)
    y = backend.put(expected)
    backend.core.moe_permute(backend.put(slots), backend.put(x), y)
    backend.finish()
    tokens, choices = (slots >= 0).nonzero(as_tuple=True)
    expected[slots[tokens, choices]] = x[tokens]
    torch.testing.assert_close(backend.get(y), expected, rtol=0, atol=0, equal_nan=True)


def check_combine(
    backend: Any, slots: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None
) -> None:
    out = backend.empty((slots.shape[0], y.shape[1]), y.dtype)
    on_device = None if weights is None else backend.put(weights)
    backend.core.moe_combine(backend.put(slots), on_device, backend.put(y), out)
    backend.finish()
    used = (slots >= 0).double() * (1.0 if weights is None else weights.double())
    rows = torch.where((slots >= 0)[:, :, None], y.double()[slots.clamp(min=0)], 0.0)
    expected = (used[:, :, None] * rows).sum(1)
    terms = (used.abs()[:, :, None] * rows.abs()).sum(1)
    assert_within(backend.get(out), expected, rounded(expected, y.dtype, terms))


def check_combine_bwd(
    backend: Any, slots: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, dout: torch.Tensor
) -> None:
    dy = backend.put(torch.zeros_like(y))
    dweights = backend.empty(tuple(slots.shape), torch.float32)
    on_device = [backend.put(t) for t in (slots, weights, dout, y)]
    backend.core.moe_combine_bwd(*on_device, dy, dweights)
    backend.finish()
    here = slots >= 0
    expected = torch.zeros(y.shape, dtype=torch.float64)
    expected[slots[here]] = (weights.double()[:, :, None] * dout.double()[:, None])[here]
    assert_within(backend.get(dy), expected, rounded(expected, y.dtype, expected.abs()))
    rows = torch.where(here[:, :, None], y.double()[slots.clamp(min=0)], 0.0)
    products = dout.double()[:, None] * rows
    bound = rounded(products.sum(-1), torch.float32, products.abs().sum(-1))
    assert_within(backend.get(dweights), products.sum(-1), bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_permute(backend: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, choices, cols = shape
    (x,) = randoms((tokens, cols), dtype=dtype)
    check_permute(backend, *routing(tokens, choices), x)


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combine(
    backend: Any, shape: tuple[int, int, int], dtype: torch.dtype, weighted: bool
) -> None:
    tokens, choices, cols = shape
    slots, places = routing(tokens, choices)
    y, dout = randoms((places, cols), (tokens, cols), dtype=dtype)
    (weights,) = randoms((tokens, choices), dtype=torch.float32)
    check_combine(backend, slots, y, weights if weighted else None)
    if weighted:
        check_combine_bwd(backend, slots, y, weights, dout)


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    choices = 1 + case.seed % 4
    slots, places = routing(case.rows, choices)
    x = case.tensor(case.rows, case.cols)
    y = case.tensor(places, case.cols, index=1)
    weights = case.normal(case.rows, choices, index=2).float()
    for t in (x, y) if case.flag else ():
        t[case.pick(t.shape[0]), case.pick(case.cols)] = float("nan")
    check_permute(CPU, slots, places, x)
    check_combine(CPU, slots, y, None)
    check_combine(CPU, slots, y, weights)
    check_combine_bwd(CPU, slots, y, weights, case.normal(case.rows, case.cols, index=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, dtype: torch.dtype) -> None:
    tokens, choices, cols = 8, 2, 1024
    slots = torch.randperm(tokens * choices).view(tokens, choices)
    x, y = randoms((tokens, cols), (tokens * choices, cols), dtype=dtype)
    counted.core.moe_permute(counted.put(slots), counted.put(x), counted.put(y))
    counted.finish()
    c = counted.core.counters()
    assert c["unique_read_bytes"] == x.nbytes + slots.nbytes
    assert c["written_bytes"] == y.nbytes
    assert c["sectors"] <= 1.05 * c["min_sectors"]
    counted.core.clear_counters()
    counted.core.moe_combine(counted.put(slots), None, counted.put(y), counted.put(x))
    counted.finish()
    c = counted.core.counters()
    assert c["unique_read_bytes"] == y.nbytes + slots.nbytes
    assert c["written_bytes"] == x.nbytes
    assert c["sectors"] <= 1.05 * c["min_sectors"]


def test_binding_refuses() -> None:
    slots = torch.zeros(4, 2, dtype=torch.int64)
    x, y = torch.zeros(4, 8), torch.zeros(8, 8)
    for arguments, message in (
        ((slots.int(), x, y), "slots is not int64"),
        ((slots[:3], x, y), r"x has shape \(4,8\), expected \(3,8\)"),
        ((slots, x, y[:, :4].contiguous()), r"y has shape \(8,4\), expected \(8,8\)"),
        ((slots, x, y.half()), "y is float16, expected float32"),
    ):
        with pytest.raises(ValueError, match=f"moe_permute: {message}"):
            _core.moe_permute(*arguments)


# --- routing, and the torch operators ----------------------------------------------------------


def test_route() -> None:
    experts = torch.tensor([[2, 0], [2, 1], [0, 2]])
    route = moe_route(experts, 4)
    assert route.slots.tolist() == [[3, 0], [4, 2], [1, 5]]
    assert route.counts.tolist() == [2, 1, 3, 0]
    assert route.places == 6
    limited = moe_route(experts, 4, capacity=2)
    assert limited.slots.tolist() == [[4, 0], [5, 2], [1, -1]]
    assert (limited.counts.tolist(), limited.places) == ([2, 2, 2, 2], 8)
    with pytest.raises(ValueError, match="moe_route: experts is not int64"):
        moe_route(experts.int(), 4)


def test_opcheck() -> None:
    slots, places = routing(5, 2)
    x, y = randoms((5, 8), (places, 8), dtype=torch.float32)
    (weights,) = randoms((5, 2), dtype=torch.float32)
    ops = torch.ops.fastllm
    torch.library.opcheck(ops.moe_combine_bwd.default, (x, y, slots, weights))
    for t in (x, y, weights):
        t.requires_grad_()
    torch.library.opcheck(ops.moe_permute.default, (x, slots, places))
    for w in (weights, None):
        torch.library.opcheck(ops.moe_combine.default, (y, slots, w))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("capacity", [None, 3], ids=str)
def test_a_layer_of_experts(compiler: str | None, capacity: int | None) -> None:
    """Experts that scale by themselves: the same as each token's weighted sum of scales."""
    (x, scales), (weights,) = (
        randoms((7, 8), (3, 8), dtype=torch.float32),
        randoms((7, 2), dtype=torch.float32),
    )
    experts = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1], [0, 1]])
    route = moe_route(experts, 3, capacity)
    leaves = [t.requires_grad_() for t in (x, scales, weights)]
    expert_of_place = torch.repeat_interleave(torch.arange(3), route.counts)

    def layer(x: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = moe_permute(x, route.slots, route.places) * scales[expert_of_place]
        return (
            moe_combine(y, route.slots, weights).sin().sum()
            + moe_combine(y, route.slots).cos().sum()
        )

    run = torch.compile(layer, fullgraph=True, backend=compiler) if compiler else layer
    got = torch.autograd.grad(run(*leaves), leaves)
    x64, s64, w64 = (t.detach().double().requires_grad_() for t in leaves)
    kept = (route.slots >= 0).double()
    copies = x64[:, None] * s64[experts] * kept[:, :, None]
    loss = (w64[:, :, None] * copies).sum(1).sin().sum() + copies.sum(1).cos().sum()
    want = torch.autograd.grad(loss, (x64, s64, w64))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
