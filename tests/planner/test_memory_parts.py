"""Which parts make up a stage's peak, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastllm_planner.memory import StageMemory
from fastllm_planner.memory_parts import memory_parts

STAGE = StageMemory(
    stage=0,
    layers=4,
    weights=20.0,
    gradients=30.0,
    step_gradients=30.0,
    optimizer=40.0,
    activations=100.0,
    logits=7.0,
    workspace=5.0,
    gathered_layers=3.0,
    comm_buffers=2.0,
    optimizer_temporaries=10.0,
    fragmentation_share=0.0,
    overhead=1.0,
    lazy_gradients=False,
)


def parts(**changes: float | bool) -> dict[str, float]:
    stage = replace(STAGE, **changes)
    found = memory_parts(stage)
    assert sum(found.values()) == pytest.approx(stage.required)
    return {key: value for key, value in found.items() if value}


def test_in_the_backward_pass() -> None:
    states = {"weights": 20, "gradients": 30, "optimizer": 40}
    rest = {"activations": 100, "transient": 7, "gathered": 3, "runtime": 3}
    assert parts() == {**states, **rest}


def test_in_the_optimizer_step() -> None:
    # 20+30+40 + 200 is above the backward pass's 200: its activations are gone by then.
    assert parts(optimizer_temporaries=200.0) == {
        **{"weights": 20, "gradients": 30, "optimizer": 40},
        **{"transient": 200, "runtime": 3},
    }


def test_gradients_that_come_as_the_activations_go() -> None:
    fixed = {"weights": 20, "optimizer": 40, "gathered": 3, "runtime": 3}
    # at the loss: every activation and the logits, no gradient yet
    assert parts(lazy_gradients=True) == {**fixed, "activations": 100, "transient": 7}
    # the logits are small: one layer's workspace counts
    small = parts(lazy_gradients=True, logits=1.0)
    assert small == {**fixed, "activations": 100, "transient": 5}
    # more gradients than activations: the end of the backward pass
    heavy = parts(lazy_gradients=True, gradients=300.0, optimizer_temporaries=1.0)
    assert heavy == {**fixed, "gradients": 300, "transient": 5}
