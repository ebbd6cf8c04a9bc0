"""Masters that share their upper halves with the bf16 weights equal whole ones to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from train_layouts import ADAMW, tiny_config

from fastllm_train.engine_choice import splits_masters
from fastllm_train.errors import UserError
from fastllm_train.master_weights import MasterWeights
from fastllm_train.ops.adamw import split_
from fastllm_train.optimizer import OptimConfig
from fastllm_train.refusals import refuse
from fastllm_train.trace.step import trace_stage

SHAPES = ((7, 33), (129,), (64, 64), (1,))
TIE = 0x3F808000  # half way between 1, whose last bit is even, and the next bf16


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in SHAPES]


def of_bits(bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.full(shape, bits, dtype=torch.int32).view(torch.float32)


def upper_half(master: torch.Tensor) -> torch.Tensor:
    upper = torch.empty(master.shape, dtype=torch.bfloat16)
    split_(master, upper, torch.empty(master.shape, dtype=torch.int16))
    return upper


class Pair:
    """The same states, split and whole."""

    def __init__(self, config: OptimConfig) -> None:
        self.models = (parameters(1), parameters(1))
        split, whole = self.models
        self.states = (
            MasterWeights(split, config, split=True),
            MasterWeights(whole, config, split=False),
        )

    def check(self) -> None:
        split, whole = self.states
        for a, b in zip(*self.models, strict=True):
            assert torch.equal(split.weight(a), whole.weight(b))
            assert torch.equal(a.detach(), upper_half(whole.weight(b)))
            for key, moment in whole.moments(b).items():
                assert torch.equal(split.moments(a)[key], moment)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_updates_equal_those_of_whole_masters(name: Any, grad_dtype: torch.dtype) -> None:
    pair = Pair(OptimConfig(name=name, lr=1e-2))
    pair.check()
    generator = torch.Generator().manual_seed(7)
    for step in range(60):
        grads = [torch.randn(s, generator=generator).to(grad_dtype) for s in SHAPES]
        if step % 10 == 3:
            grads[1] *= 0
        scale = torch.tensor([0.5]) if step % 3 else None
        for states, model in zip(pair.states, pair.models, strict=True):
            of = dict(zip(model, grads, strict=True))
            missing = model[3] if step % 2 else None
            states.update(lambda p, of=of, no=missing: None if p is no else of[p], 1e-2, scale)
        pair.check()
    whole = pair.states[1]
    moved = [
        whole.weight(p) != q.float() for p, q in zip(pair.models[1], parameters(1), strict=True)
    ]
    assert all(bool(m.all()) for m in moved)


@pytest.mark.parametrize("bits", [TIE, TIE + 0x10000, TIE - 2**31, 0x7F7FFFFF, 0x8000, 1])
def test_states_go_from_one_form_to_the_other(bits: int) -> None:
    """And back, also a master half way between two weights, whose weight then differs from whole
    masters', rounded to even."""
    pair = Pair(OptimConfig())
    for param, other in zip(*pair.models, strict=True):
        master = of_bits(bits, tuple(param.shape))
        moments = {key: torch.full(param.shape, 0.5) for key in ("exp_avg", "exp_avg_sq")}
        pair.states[1].restore(other, master, moments)
        pair.states[0].restore(param, pair.states[1].weight(other), pair.states[1].moments(other))
        assert torch.equal(pair.states[0].weight(param), master)
        pair.states[1].restore(other, pair.states[0].weight(param), pair.states[0].moments(param))
        assert torch.equal(pair.states[1].weight(other), master)
    pair.check()


def test_masters_are_what_the_model_says() -> None:
    model = parameters(2)
    states = MasterWeights(model, OptimConfig(), split=True)
    states.restore(model[0], of_bits(TIE, SHAPES[0]), {})
    assert (states.weight(model[0]) != model[0].float()).all()
    states.take_from_model()
    assert (states.weight(model[0]) == model[0].float()).all()


def test_where_they_are_split() -> None:
    bf16 = {"dtype": "bf16"}
    for sections, split in (
        ({"precision": bf16}, True),
        ({"precision": {**bf16, "masters": "whole"}}, False),
        ({}, False),
        ({"precision": bf16, "parallel": {"dp": 2, "zero_stage": 1}}, True),
        ({"precision": bf16, "parallel": {"dp": 2, "zero_stage": 2}}, False),
    ):
        config = tiny_config(**sections, speed={"engine": "auto"})
        refuse(config, config.model.resolve())
        assert splits_masters(config) == split
    for wish, message in (
        ({"parallel": {"dp": 2, "zero_stage": 2}}, "parallel.zero_stage=2 takes DeepSpeed"),
        ({"speed": {"engine": "deepspeed"}}, 'speed.engine="deepspeed" takes DeepSpeed'),
    ):
        config = tiny_config(
            **{"speed": {"engine": "auto"}, "precision": {**bf16, "masters": "split"}, **wish}
        )
        with pytest.raises(UserError, match=message):
            refuse(config, config.model.resolve())
    for dtype in ("fp32", "fp16"):
        with pytest.raises(UserError, match=f'"split" is for bf16, .* not {dtype}'):
            tiny_config(precision={"dtype": dtype, "masters": "split"})


def test_the_trace_sees_two_bytes_a_parameter_less() -> None:
    base = tiny_config(precision={"dtype": "bf16"}, optim=ADAMW, speed={"engine": "torch"})
    optimizer = {}
    for masters in ("split", "whole"):
        config = replace(base, precision=replace(base.precision, masters=masters))
        found = trace_stage(config, config.model.resolve(), 0)
        optimizer[masters] = found.peak.by_category["optimizer"]
    saved = optimizer["whole"] - optimizer["split"]
    assert saved == pytest.approx(2 * found.params, rel=0.02)
    assert optimizer["whole"] == pytest.approx(12 * found.params, rel=0.02)
