"""The torch engine trains as one process does, resumes to the bit, and goes on from DeepSpeed's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from train_layouts import (
    ADAMW,
    Trajectory,
    assert_same_bf16_training,
    assert_same_training,
    reference,
    tiny_arch,
    tiny_config,
)
from train_worker import SAVE_AT, all_tensors, run_layouts

from fastllm_train.config import Config
from fastllm_train.engine_choice import chosen_engine
from fastllm_train.errors import UserError
from fastllm_train.refusals import refuse

TORCH, SP = {"speed": {"engine": "torch"}}, {"sequence_parallel": True}
BF16, SUMS = {"dtype": "bf16"}, {"dtype": "bf16", "accumulate": "fp32"}
WHOLE = {"dtype": "bf16", "masters": "whole"}
# The plain reference's loss with 20 steps in bf16 moves this little by rounding (see
# test_layout_training).
TWENTY: dict[str, Any] = {
    "optim": {**ADAMW, "lr": 1e-3},
    "schedule": {"kind": "constant", "steps": 20},
}
# By "family optimizer layout"; SGD with clipping that acts shows a norm that counts a tensor twice
# or not at all, and a wrong scale.
FP32: dict[str, dict[str, Any]] = {
    "llama sgd alone": {},
    "llama adamw alone, zero 3": {"zero_stage": 3},
    "llama sgd dp2": {"dp": 2},
    "llama adamw dp2": {"dp": 2},
    "llama sgd tp2 sp": {"tp": 2, **SP, "zero_stage": 1},
    "llama sgd tp2 dp2": {"tp": 2, "dp": 2},
    "llama adamw tp2 pp2 dp2 sp, full": {"tp": 2, "pp": 2, "dp": 2, **SP, "recompute": "full"},
    "baichuan sgd cp2": {"cp": 2},
    "baichuan adamw tp2 sp": {"tp": 2, **SP},
    "gpt2 sgd dp2": {"dp": 2},
    "gpt2 sgd pp2": {"pp": 2, "zero_stage": 2},
    "gpt2 sgd tp2 pp2 dp2": {"tp": 2, "pp": 2, "dp": 2},
    "mixtral sgd dp2": {"dp": 2},
    "mixtral sgd ep2": {"dp": 2, "ep": 2},
    "mixtral sgd tp2": {"tp": 2},
    "mixtral adamw ep2 pp2": {"dp": 2, "ep": 2, "pp": 2},
    "llama sgd dp2 zero 1": {"dp": 2, "zero_stage": 1},
    "llama adamw dp4 zero 1": {"dp": 4, "zero_stage": 1},
    "llama adamw tp2 pp2 dp2 sp zero 1": {"tp": 2, "pp": 2, "dp": 2, **SP, "zero_stage": 1},
    "baichuan sgd cp2 zero 1": {"cp": 2, "zero_stage": 1},
    "gpt2 sgd pp2 dp2 zero 1": {"pp": 2, "dp": 2, "zero_stage": 1},
    "gpt2 adamw tp2 dp2 zero 1": {"tp": 2, "dp": 2, "zero_stage": 1},
    "mixtral sgd ep2 zero 1": {"dp": 2, "ep": 2, "zero_stage": 1},
    "mixtral sgd ep2 dp4 zero 1": {"dp": 4, "ep": 2, "zero_stage": 1},
}
IN_BF16: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama alone": ({}, BF16),
    "llama dp2": ({"dp": 2}, BF16),
    "llama dp2, fp32 sums": ({"dp": 2}, SUMS),
    "llama dp2 zero 1": ({"dp": 2, "zero_stage": 1}, BF16),
    "llama dp2 zero 1, fp32 sums": ({"dp": 2, "zero_stage": 1}, SUMS),
    "llama alone, fp32 sums": ({}, SUMS),
    "llama alone, whole": ({}, WHOLE),
    "gpt2 pp2 tp2": ({"pp": 2, "tp": 2}, BF16),
    "mixtral ep2": ({"dp": 2, "ep": 2}, BF16),
}
# What is done wrong (``train_worker.planted``) → where.
WRONG: dict[str, dict[str, Any]] = {
    "one bucket left: dp2": {"dp": 2},
    "torch mean of means: dp2": {"dp": 2},
    "all copies counted: tp2": {"tp": 2},
    "one bucket left: dp2 zero 1": {"dp": 2, "zero_stage": 1},
    "shares not gathered: dp2 zero 1": {"dp": 2, "zero_stage": 1},
    "whole sums counted: dp2 zero 1": {"dp": 2, "zero_stage": 1},
}
# As on a GPU: shares are reduced alone.
SCATTERED: dict[str, dict[str, Any]] = {
    "scattered: dp2 zero 1": {"dp": 2, "zero_stage": 1},
    "scattered: tp2 dp2 zero 1": {"tp": 2, "dp": 2, "zero_stage": 1},
}
# Whole and cut, of two replicas, whose sums have one order, and without clipping, whose norm is
# added up in another: equal to the bit.
CUT = {
    f"{dtype} {layout}": (dtype, layout) for dtype in ("fp32", "bf16") for layout in ("dp2", "cp2")
}
# Saved by one engine after SAVE_AT steps, gone on from by another: name → (layout, engine).
SAVED: dict[str, tuple[dict[str, Any], str]] = {
    "torch": ({"tp": 2}, "torch"),
    "torch-dp2": ({"dp": 2}, "torch"),
    "deepspeed": ({"dp": 2, "zero_stage": 1}, "deepspeed"),
    "deepspeed-zero2": ({"dp": 2, "zero_stage": 2}, "deepspeed"),
}
GOES_ON: dict[str, tuple[dict[str, Any], str]] = {
    "load torch": ({"tp": 2}, "torch"),
    "load torch in pp2": ({"pp": 2}, "torch"),
    "load torch in deepspeed": ({"dp": 2, "zero_stage": 1}, "deepspeed"),
    "load torch in deepspeed zero3": ({"dp": 2, "zero_stage": 3}, "deepspeed"),
    "load torch-dp2 in one process": ({}, "torch"),
    "load deepspeed in torch": ({"pp": 2}, "torch"),
    "load deepspeed in torch dp2": ({"dp": 2}, "torch"),
    "load torch in torch dp2 zero 1": ({"dp": 2, "zero_stage": 1}, "torch"),
    "load deepspeed in torch dp2 zero 1": ({"dp": 2, "zero_stage": 1}, "torch"),
    "load deepspeed-zero2 in torch tp2": ({"tp": 2}, "torch"),
}
# Resumed in the same layout.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dp2 bf16, fp32 sums": ({"dp": 2}, SUMS),
    "tp2 bf16": ({"tp": 2, **SP}, BF16),
    "pp2 tied bf16": ({"pp": 2}, BF16),
    "ep2 fp32": ({"dp": 2, "ep": 2}, {}),
    "dp2 zero 1 bf16": ({"dp": 2, "zero_stage": 1}, BF16),
    "dp4 ep2 zero 1 fp32": ({"dp": 4, "ep": 2, "zero_stage": 1}, {}),
}
# Saved with masters in one form, loaded into the other.
FORMS: dict[str, tuple[str, str]] = {"split": ("split", "whole"), "whole": ("whole", "split")}


def config_of(family: str, parallel: dict[str, Any], **sections: Any) -> Config:
    batch = {"micro": 1 if parallel.get("dp", 1) * parallel.get("pp", 1) > 1 else 2, "global": 4}
    arch = {"arch": tiny_arch(family)}
    return tiny_config(model=arch, parallel=parallel, batch=batch, **{**TORCH, **sections})


def configs() -> dict[str, Config]:
    found = {
        name: config_of(name.split()[0], layout, optim=ADAMW if "adamw" in name else {})
        for name, layout in FP32.items()
    }
    found |= {
        f"bf16 {name}": config_of(name.split()[0], layout, precision=precision, **TWENTY)
        for name, (layout, precision) in IN_BF16.items()
    }
    found |= {name: config_of("llama", layout) for name, layout in (WRONG | SCATTERED).items()}
    for name, (dtype, axis) in CUT.items():
        exact: dict[str, Any] = {"optim": {**ADAMW, "clip": 0.0}, "precision": {"dtype": dtype}}
        for stage in (0, 1):
            layout = {axis[:-1]: 2, "zero_stage": stage}
            found[f"zero {stage} {name}"] = config_of("llama", layout, **exact)
    return found


def saving_configs(folder: Path) -> dict[str, Config]:
    """In the order in which they run."""
    more: dict[str, Any] = {"optim": ADAMW, "checkpoint": {"format": "portable"}}
    found: dict[str, Config] = {}
    for name, (layout, precision) in SAME.items():
        family = "mixtral" if "ep" in layout else "gpt2" if "tied" in name else "llama"
        out = {"out": str(folder / name)}
        for action in ("save", "load"):
            found[f"{action} {name}"] = config_of(
                family, layout, precision=precision, run=out, **more
            )
    for name, forms in FORMS.items():
        out = {"out": str(folder / name)}
        for action, masters in zip(("save", "load"), forms, strict=True):
            precision = {**BF16, "masters": masters}
            found[f"{action} {name}"] = config_of(
                "llama", {"tp": 2}, precision=precision, run=out, **more
            )
    found["no master: load tp2 bf16"] = found["load tp2 bf16"]
    for name, (layout, engine) in SAVED.items():
        found[f"save by {name}"] = config_of(
            "llama", layout, speed={"engine": engine}, run={"out": str(folder / name)}, **more
        )
    for name, (layout, engine) in GOES_ON.items():
        out = {"out": str(folder / name.split()[1])}
        found[name] = config_of("llama", layout, speed={"engine": engine}, run=out, **more)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch_engine")


@pytest.fixture(scope="module")
def trajectories(folder: Path) -> dict[str, Trajectory]:
    found = {**configs(), **saving_configs(folder)}
    # A job for each number of processes: one that loads what another saved comes after it.
    later = {"load torch-dp2 in one process"}
    first = run_layouts({k: v for k, v in found.items() if k not in later}, folder)
    return first | run_layouts({k: v for k, v in found.items() if k in later}, folder)


@cache
def one_process(family: str, optimizer: str) -> Trajectory:
    return reference(config_of(family, {}, optim=ADAMW if optimizer == "adamw" else {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", FP32)
def test_training_equals_one_process(name: str, trajectories: dict[str, Trajectory]) -> None:
    assert_same_training(trajectories[name], one_process(*name.split()[:2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCATTERED)
def test_shares_may_be_reduced_alone(name: str, trajectories: dict[str, Trajectory]) -> None:
    assert_same_training(trajectories[name], one_process("llama", "sgd"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_cut_states_give_the_same_bits(name: str, trajectories: dict[str, Trajectory]) -> None:
    whole, cut = (trajectories[f"zero {stage} {name}"] for stage in (0, 1))
    assert cut.losses == whole.losses
    assert all(torch.equal(cut.weights[key], weight) for key, weight in whole.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_anything_done_wrong_would_be_seen(name: str, trajectories: dict[str, Trajectory]) -> None:
    with pytest.raises(AssertionError):
        assert_same_training(trajectories[name], one_process("llama", "sgd"))


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_BF16)
def test_bf16_follows_a_reference_with_fp32_master(
    name: str, trajectories: dict[str, Trajectory]
) -> None:
    """Without ZeRO, where DeepSpeed's own bf16 takes a step too many."""
    want = reference(config_of(name.split()[0], {}, **TWENTY), dtype=torch.bfloat16)
    assert_same_bf16_training(trajectories[f"bf16 {name}"], want)


def resumes_to_the_bit(resumed: Trajectory, straight: Trajectory) -> None:
    assert resumed.losses == straight.losses[SAVE_AT:]
    assert resumed.norms == straight.norms[SAVE_AT:]
    for key, weight in straight.weights.items():
        assert torch.equal(resumed.weights[key], weight), key


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_the_same_layout_resumes_to_the_bit(name: str, trajectories: dict[str, Trajectory]) -> None:
    resumes_to_the_bit(trajectories[f"load {name}"], trajectories[f"save {name}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_masters_in_one_form_are_loaded_into_the_other(
    name: str, folder: Path, trajectories: dict[str, Trajectory]
) -> None:
    """To the bit; the runs then differ by how ties are rounded."""
    step = f"global_step{SAVE_AT}"
    want, got = (all_tensors(at / step) for at in (folder / name, folder / name / f"load {name}"))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key
    straight = trajectories[f"save {name}"]
    assert trajectories[f"load {name}"].losses == pytest.approx(straight.losses[SAVE_AT:], abs=1e-3)


@pytest.mark.slow
def test_a_master_rounded_to_bf16_would_be_seen(trajectories: dict[str, Trajectory]) -> None:
    with pytest.raises(AssertionError):
        resumes_to_the_bit(trajectories["no master: load tp2 bf16"], trajectories["save tp2 bf16"])


@pytest.mark.slow
@pytest.mark.parametrize("name", GOES_ON)
def test_engines_go_on_from_each_other_s_portable_checkpoints(
    name: str, trajectories: dict[str, Trajectory]
) -> None:
    straight = trajectories[f"save by {name.split()[1]}"]
    losses, norms = straight.losses[SAVE_AT:], straight.norms[SAVE_AT:]
    assert_same_training(trajectories[name], replace(straight, losses=losses, norms=norms))


@pytest.mark.slow
@pytest.mark.parametrize("name", GOES_ON)
def test_engines_hold_exactly_what_the_other_saved(
    name: str, folder: Path, trajectories: dict[str, Trajectory]
) -> None:
    """Masters and moments, gathered again right after loading."""
    saved, step = folder / name.split()[1], f"global_step{SAVE_AT}"
    assert name in trajectories
    want, got = (all_tensors(at / step) for at in (saved, saved / name))
    assert got.keys() == want.keys()
    assert any(key.startswith("exp_avg_sq/") for key in want)
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


@pytest.mark.parametrize(
    ("sections", "engine"),
    [
        ({"parallel": {"dp": 4, "zero_stage": 0, "tp": 2, "pp": 2}}, "torch"),
        ({"parallel": {"dp": 1, "zero_stage": 3}}, "torch"),
        ({"parallel": {"dp": 2, "zero_stage": 1}}, "torch"),
        ({"parallel": {"dp": 2, "zero_stage": 2}}, "deepspeed"),
        ({"parallel": {"cp": 2, "zero_stage": 3}}, "deepspeed"),
        ({"parallel": {"zero_stage": 1, "offload": "optimizer"}}, "deepspeed"),
        ({"precision": {"dtype": "fp16"}}, "deepspeed"),
        ({"checkpoint": {"format": "deepspeed"}}, "deepspeed"),
        ({"checkpoint": {"format": "portable"}}, "torch"),
    ],
)
def test_deepspeed_trains_what_it_alone_can(sections: dict[str, Any], engine: str) -> None:
    config = tiny_config(**sections, speed={"engine": "auto"})
    refuse(config, config.model.resolve())
    assert chosen_engine(config) == engine
    wanted = tiny_config(**sections, **TORCH)
    if engine == "deepspeed":
        with pytest.raises(UserError, match="is DeepSpeed's"):
            refuse(wanted, wanted.model.resolve())
    else:
        refuse(wanted, wanted.model.resolve())
