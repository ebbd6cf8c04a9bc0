"""AdamW on every backend against float64 and against torch.optim.AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.adamw import adamw_

from .accuracy import DTYPES
from .random_inputs import CPU, RandomCase, random_cases

LR, BETA1, BETA2, EPS, DECAY = 3e-3, 0.9, 0.95, 1e-8, 0.1


@dataclass
class State:
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    model: torch.Tensor | None = None


def sample(count: int, dtype: torch.dtype) -> tuple[State, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    master, exp_avg, exp_avg_sq, grad = torch.randn(4, count, generator=generator)
    return State(master, exp_avg * 0.1, exp_avg_sq.square() * 0.01), grad.to(dtype)


def run(
    backend: Any,
    state: State,
    grad: torch.Tensor,
    step: int,
    scale: float | None = None,
    model: torch.dtype | None = None,
    offset: int = 0,
) -> State:
    on_device = [backend.put(t) for t in (state.master, grad, state.exp_avg, state.exp_avg_sq)]
    copy = None if model is None else backend.empty(tuple(state.master.shape), model, offset)
    scale_there = None if scale is None else backend.put(torch.tensor([scale]))
    backend.core.adamw(*on_device, copy, scale_there, LR, BETA1, BETA2, EPS, DECAY, step)
    backend.finish()
    master, _, exp_avg, exp_avg_sq = (backend.get(t) for t in on_device)
    return State(master, exp_avg, exp_avg_sq, None if copy is None else backend.get(copy))


def reference(state: State, grad: torch.Tensor, step: int, scale: float) -> State:
    g = grad.double() * scale
    exp_avg = BETA1 * state.exp_avg.double() + (1 - BETA1) * g
    exp_avg_sq = BETA2 * state.exp_avg_sq.double() + (1 - BETA2) * g * g
    update = exp_avg / (1 - BETA1**step)
    update = update / ((exp_avg_sq / (1 - BETA2**step)).sqrt() + EPS)
    return State(state.master.double() * (1 - LR * DECAY) - LR * update, exp_avg, exp_avg_sq)


def check(got: State, state: State, grad: torch.Tensor, step: int, scale: float) -> None:
    want = reference(state, grad, step, scale)
    # Sums of two terms: float32's error is relative to the terms, 1 - beta to 3e-7.
    g = grad.double().abs() * scale
    terms = BETA1 * state.exp_avg.abs() + (1 - BETA1) * g
    assert ((got.exp_avg - want.exp_avg).abs() <= terms * 1e-6 + 1e-40).all()
    torch.testing.assert_close(got.exp_avg_sq.double(), want.exp_avg_sq, rtol=2e-6, atol=1e-40)
    ratio = terms / (1 - BETA1**step) / ((want.exp_avg_sq / (1 - BETA2**step)).sqrt() + EPS)
    bound = state.master.abs() * 2e-7 + LR * ratio * 4e-6
    assert ((got.master - want.master).abs() <= bound).all()
    if got.model is not None:
        assert torch.equal(got.model, got.master.to(got.model.dtype))


@pytest.mark.parametrize("model", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 100, 4099])
def test_values(
    backend: Any, count: int, grad_dtype: torch.dtype, model: torch.dtype | None
) -> None:
    state, grad = sample(count, grad_dtype)
    check(run(backend, state, grad, 3, model=model), state, grad, 3, 1.0)


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    state, _ = sample(case.rows * case.cols, torch.float32)
    grad = case.tensor(case.rows * case.cols)
    step = 1 + case.seed % 5000
    scale = 0.25 if case.flag else None
    got = run(CPU, state, grad, step, scale, model=case.dtype)
    check(got, state, grad, step, scale or 1.0)
    grad[case.pick(grad.numel())] = float("nan")
    got = run(CPU, state, grad, step, model=case.dtype)
    for result in (got.master, got.exp_avg, got.exp_avg_sq, got.model):
        assert result is not None
        assert torch.equal(result.isnan(), grad.isnan())


@pytest.mark.parametrize("step", [1, 2, 1000, 1_000_000])
def test_steps_and_scale(backend: Any, step: int) -> None:
    state, grad = sample(513, torch.bfloat16)
    got = run(backend, state, grad, step, scale=0.125, model=torch.bfloat16)
    check(got, state, grad, step, 0.125)


def test_unaligned(backend: Any) -> None:
    state, grad = sample(640, torch.float32)
    check(run(backend, state, grad, 2, model=torch.bfloat16, offset=1), state, grad, 2, 1.0)


def test_zero_gradient_of_a_new_tensor_only_decays(backend: Any) -> None:
    state, grad = sample(64, torch.float32)
    state = State(state.master, torch.zeros(64), torch.zeros(64))
    got = run(backend, state, torch.zeros_like(grad), 1)
    torch.testing.assert_close(got.master, state.master * (1 - LR * DECAY), rtol=2e-7, atol=0)
    assert not got.exp_avg.any()


def test_nan_stays_where_it_is(backend: Any) -> None:
    state, grad = sample(100, torch.bfloat16)
    grad[7] = float("nan")
    got = run(backend, state, grad, 5, model=torch.bfloat16)
    assert got.model is not None
    for result in (got.master, got.exp_avg, got.exp_avg_sq, got.model):
        assert result.isnan().nonzero().flatten().tolist() == [7]


def test_empty(backend: Any) -> None:
    state, grad = sample(0, torch.float32)
    assert run(backend, state, grad, 1).master.shape == (0,)


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, grad_dtype: torch.dtype) -> None:
    state, grad = sample(4096, grad_dtype)
    run(counted, state, grad, 1, model=torch.bfloat16)
    c = counted.core.counters()
    assert c["read_bytes"] == c["unique_read_bytes"] == 3 * state.master.nbytes + grad.nbytes
    assert c["written_bytes"] == 3 * state.master.nbytes + 2 * 4096
    assert c["sectors"] == c["min_sectors"]


def test_binding_refuses() -> None:
    state, grad = sample(8, torch.float32)
    tensors = (state.master, grad, state.exp_avg, state.exp_avg_sq)
    numbers = (LR, BETA1, BETA2, EPS, DECAY)
    call: Any = _core.adamw
    call(*tensors, None, None, *numbers, 1)
    for arguments, message in (
        ((*tensors, None, None, *numbers, 0), "step counts from 1"),
        ((*tensors, None, torch.ones(2), *numbers, 1), "grad_scale has not one element"),
        ((*tensors, state.master, None, *numbers, 1), "model overlaps master"),
        ((state.master.half(), *tensors[1:], None, None, *numbers, 1), "master is float16"),
        ((*tensors[:3], torch.ones(9), None, None, *numbers, 1), "exp_avg_sq has shape"),
    ):
        with pytest.raises(ValueError, match=f"adamw: {message}"):
            call(*arguments)


def test_opcheck() -> None:
    state, grad = sample(40, torch.float32)
    arguments = (state.master, grad, state.exp_avg, state.exp_avg_sq)
    numbers = (LR, BETA1, BETA2, EPS, DECAY, 1)
    model = torch.empty(40, dtype=torch.bfloat16)
    op = torch.ops.fastllm.adamw_.default
    torch.library.opcheck(op, (*arguments, None, torch.ones(1), *numbers))
    torch.library.opcheck(op, (*arguments, model, None, *numbers))


def test_same_path_as_torch() -> None:
    """Twenty steps, with gradients that depend on the weights."""
    start = torch.linspace(-2, 2, 101)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], LR, (BETA1, BETA2), EPS, DECAY)
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros(101), torch.zeros(101)
    for step in range(1, 21):
        optimizer.zero_grad()
        theirs.cos().sum().backward()
        optimizer.step()
        adamw_(
            ours, -ours.sin(), exp_avg, exp_avg_sq,
            lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY, step=step,
        )  # fmt: skip
    assert (ours - start).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
