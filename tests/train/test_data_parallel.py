"""Every data-parallel layout equals one plain process."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from train_layouts import (
    ADAMW,
    Trajectory,
    assert_same_bf16_curve,
    assert_same_bf16_training,
    assert_same_training,
    reference,
    tiny_arch,
    tiny_config,
)
from train_worker import run_layouts

from fastllm_train.config import Config


def fp32_configs() -> dict[str, Config]:
    """What ``test_layout_training`` leaves out: no ZeRO, no accumulation, offload, recomputation of
    the attention core. SGD with clipping that acts: AdamW alone would hide a wrong gradient scale.
    """
    configs: dict[str, Config] = {}
    for family in ("llama", "mixtral", "gpt2"):  # experts without a token; tied embeddings
        arch = {"arch": tiny_arch(family)}
        configs[f"sgd {family}"] = tiny_config(model=arch, parallel={"dp": 2, "zero_stage": 0})
    configs["adamw llama"] = tiny_config(parallel={"dp": 2, "zero_stage": 0}, optim=ADAMW)
    parallel: dict[str, Any] = {"dp": 2, "zero_stage": 1, "recompute": "selective"}
    configs["sgd llama selective"] = tiny_config(parallel=parallel)
    parallel = {"dp": 2, "zero_stage": 1}
    configs["sgd llama at once"] = tiny_config(parallel=parallel, batch={"micro": 4})
    for stage, offload in ((2, "optimizer"), (3, "optimizer+params")):
        parallel = {"dp": 2, "zero_stage": stage, "offload": offload}
        configs[f"adamw llama offload {offload}"] = tiny_config(parallel=parallel, optim=ADAMW)
    return configs


OTHERS = ("baichuan", "gpt2", "mixtral")
BESIDES = [f"zero{stage} {family}" for family in OTHERS for stage in (2, 3)]
TWENTY = {"kind": "constant", "steps": 20}


def bf16_configs() -> dict[str, Config]:
    """``bf16 …`` accumulate over two micro-batches and clip; ``exact …`` do neither."""
    configs: dict[str, Config] = {}
    once: dict[str, Any] = {"optim": {**ADAMW, "clip": 0.0}, "batch": {"micro": 4}}
    for stage in (0, 1, 2, 3):
        more: dict[str, Any] = {
            "parallel": {"dp": 2, "zero_stage": stage},
            "precision": {"dtype": "bf16"},
            "schedule": TWENTY,
        }
        configs[f"bf16 zero{stage}"] = tiny_config(optim=ADAMW, **more)
        configs[f"exact zero{stage}"] = tiny_config(**once, **more)
    for planted in ("zero0 as it is", "zero0 without its step"):
        configs[f"{planted}: bf16"] = configs["bf16 zero0"]
    for family, stage in itertools.product(OTHERS, (1, 2, 3)):
        configs[f"exact zero{stage} {family}"] = tiny_config(
            model={"arch": tiny_arch(family)},
            parallel={"dp": 2, "zero_stage": stage},
            precision={"dtype": "bf16"},
            **once,
        )
    return configs


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trajectory]:
    return run_layouts({**fp32_configs(), **bf16_configs()}, tmp_path_factory.mktemp("layouts"))


@cache
def one_process(optimizer: str, family: str) -> Trajectory:
    optim = {"sgd": {}, "adamw": ADAMW}[optimizer]
    return reference(tiny_config(model={"arch": tiny_arch(family)}, optim=optim))


@cache
def one_process_in_bf16() -> Trajectory:
    return reference(tiny_config(optim=ADAMW, schedule=TWENTY), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", fp32_configs())
def test_fp32_layout_equals_one_process(name: str, trajectories: dict[str, Trajectory]) -> None:
    optimizer, family, *_ = name.split()
    assert_same_training(trajectories[name], one_process(optimizer, family))


def test_mean_of_means_would_be_seen() -> None:
    with pytest.raises(AssertionError):
        assert_same_training(
            reference(tiny_config(), mean_of_means=True), one_process("sgd", "llama")
        )


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", *BESIDES])
def test_bf16_zero_stages_are_equal(name: str, trajectories: dict[str, Trajectory]) -> None:
    """To the bit. (The norm that clips is summed in another order; accumulation over micro-batches
    rounds to bf16 before or after the reduction.)"""
    stage, _, family = name.partition(" ")
    one, other = (trajectories[f"exact {zero} {family}".strip()] for zero in ("zero1", stage))
    assert other.losses == one.losses
    for key, weight in one.weights.items():
        assert torch.equal(other.weights[key], weight), key


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_follows_a_reference_with_fp32_master(
    stage: int, trajectories: dict[str, Trajectory]
) -> None:
    assert_same_bf16_training(trajectories[f"bf16 zero{stage}"], one_process_in_bf16())


def test_deepspeed_s_own_stage_0_in_bf16_would_be_seen(
    trajectories: dict[str, Trajectory],
) -> None:
    """Its optimizer takes an extra step at set-up: 0.73 of the first update and one decay too
    many. The count of steps shows it, and the losses do; without that step they are right."""
    want, got = one_process_in_bf16(), trajectories["zero0 as it is: bf16"]
    assert got.steps_before == 1
    with pytest.raises(AssertionError):
        assert_same_bf16_curve(got, want)
    assert_same_bf16_training(trajectories["zero0 without its step: bf16"], want)
