"""Checkpoints of every layout: the same layout resumes to the bit, a portable one in any layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_layouts import ADAMW, TINY, Trajectory, assert_same_training, tiny_arch, tiny_config
from train_worker import SAVE_AT, all_tensors, run_layouts

from fastllm_planner.arch import spec_from_dict
from fastllm_train.config import Config
from fastllm_train.errors import UserError
from fastllm_train.portable import INDEX, PortableCheckpoint, WholeState, write_share

# The vocabulary and the widths do not divide by 4: ZeRO's partitions cut through tensors.
ODD = {**TINY, "vocab": 130, "ffn_hidden": 98, "layers": 2}


def config_of(folder: Path, kind: str, parallel: dict[str, Any], dtype: str = "fp32") -> Config:
    arch = tiny_arch("mixtral") if "ep" in parallel else ODD
    if "tied" in folder.name:
        arch = {**ODD, "tied_embeddings": True}
    return tiny_config(
        model={"arch": arch},
        parallel=parallel,
        optim=ADAMW,
        precision={"dtype": dtype},
        checkpoint={"format": kind},
        run={"out": str(folder)},
    )


SAME: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        f"{kind} zero{stage} {dtype}": (kind, {"dp": 2, "zero_stage": stage}, dtype)
        for kind in ("deepspeed", "portable")
        for stage, dtype in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    },
    "deepspeed tp2": ("deepspeed", {"tp": 2, "sequence_parallel": True, "zero_stage": 1}, "bf16"),
    "portable tp2": ("portable", {"tp": 2, "sequence_parallel": True, "zero_stage": 1}, "bf16"),
    "deepspeed pp2": ("deepspeed", {"pp": 2, "zero_stage": 1}, "bf16"),
    "portable tied pp2": ("portable", {"pp": 2, "zero_stage": 1}, "bf16"),
    "portable ep2": ("portable", {"dp": 2, "ep": 2, "zero_stage": 1}, "bf16"),
}


@pytest.fixture(scope="module")
def same_layout(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trajectory]:
    folder = tmp_path_factory.mktemp("same")
    configs: dict[str, Config] = {}
    for name, (kind, parallel, dtype) in SAME.items():
        for action in ("save", "load"):
            configs[f"{action} {name}"] = config_of(folder / name, kind, parallel, dtype)
    return run_layouts(configs, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
def test_the_same_layout_resumes_to_the_bit(name: str, same_layout: dict[str, Trajectory]) -> None:
    straight, resumed = same_layout[f"save {name}"], same_layout[f"load {name}"]
    assert resumed.losses == straight.losses[SAVE_AT:]
    assert resumed.norms == straight.norms[SAVE_AT:]
    for key, weight in straight.weights.items():
        assert torch.equal(resumed.weights[key], weight), key


OTHERS: dict[str, dict[str, Any]] = {
    "load one process": {"dp": 1, "zero_stage": 0},
    "load dp2 zero1": {"dp": 2, "zero_stage": 1},
    "load dp2 zero3": {"dp": 2, "zero_stage": 3},
    "load tp2 zero0": {"tp": 2, "zero_stage": 0},
    "load tp2 dp2 zero1": {"tp": 2, "dp": 2, "zero_stage": 1},
    "load tp2 dp2 zero3": {"tp": 2, "dp": 2, "zero_stage": 3},
    "load pp2": {"pp": 2, "zero_stage": 1},
    "load tp2 pp2": {"tp": 2, "pp": 2, "zero_stage": 2},
    "load cp2 dp2": {"cp": 2, "dp": 2, "zero_stage": 3},
    "load dp4 zero2": {"dp": 4, "zero_stage": 2},
    "load dp4 zero3": {"dp": 4, "zero_stage": 3},
}


@pytest.fixture(scope="module")
def other_layouts(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, Trajectory]]:
    """A run of TP 2 with ZeRO-1 is saved; every other layout goes on from it."""
    folder = tmp_path_factory.mktemp("others")
    saved = {"save": config_of(folder / "run", "portable", {"tp": 2, "zero_stage": 1})}
    loaded = {
        name: config_of(folder / "run", "portable", OTHERS[name.split(": ")[-1]])
        for name in (*OTHERS, "no adam step: load dp2 zero1")
    }
    return folder / "run", {**run_layouts(saved, folder), **run_layouts(loaded, folder)}


def assert_goes_on(resumed: Trajectory, straight: Trajectory) -> None:
    losses, norms = straight.losses[SAVE_AT:], straight.norms[SAVE_AT:]
    assert_same_training(resumed, replace(straight, losses=losses, norms=norms))


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_goes_on_from_a_portable_checkpoint(
    name: str, other_layouts: tuple[Path, dict[str, Trajectory]]
) -> None:
    _, found = other_layouts
    assert_goes_on(found[name], found["save"])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_holds_exactly_what_was_saved(
    name: str, other_layouts: tuple[Path, dict[str, Trajectory]]
) -> None:
    """Masters and moments, gathered again."""
    folder, _ = other_layouts
    step = f"global_step{SAVE_AT}"
    want, got = (all_tensors(at / step) for at in (folder, folder / name))
    assert got.keys() == want.keys()
    assert any(key.startswith("exp_avg_sq/") for key in want)
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key


@pytest.mark.slow
def test_an_optimizer_that_counts_from_zero_again_would_be_seen(
    other_layouts: tuple[Path, dict[str, Trajectory]],
) -> None:
    _, found = other_layouts
    with pytest.raises(AssertionError):
        assert_goes_on(found["no adam step: load dp2 zero1"], found["save"])


def small_checkpoint(folder: Path) -> None:
    from fastllm_planner.arch import iter_params
    from fastllm_train.portable import write_description

    spec = spec_from_dict(TINY)
    states = [
        WholeState(p.name, torch.full(p.shape, 0.5), {"exp_avg": torch.zeros(p.shape)})
        for p in iter_params(spec)
    ]
    owners = {state.name: index % 2 for index, state in enumerate(states)}
    for rank in (0, 1):
        share = [state for state in states if owners[state.name] == rank]
        write_share(folder, share, rank, 2)
    write_description(folder, spec, {"step": 3}, owners, 2)


def test_hugging_face_loads_a_portable_checkpoint_s_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    small_checkpoint(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(bool((p == 0.5).all()) for p in model.parameters())


def test_a_portable_checkpoint_that_does_not_fit_is_named(tmp_path: Path) -> None:
    small_checkpoint(tmp_path)
    other = spec_from_dict({**TINY, "layers": 3})
    with pytest.raises(UserError, match=r"another model: they differ in model.layers.2"):
        PortableCheckpoint(tmp_path, other)
    wide = spec_from_dict({**TINY, "vocab": 256})
    from fastllm_planner.arch import iter_params

    embedding = next(iter_params(wide))
    with pytest.raises(UserError, match=r"shape \[128, 64\], expected float32 of \[256, 64\]"):
        PortableCheckpoint(tmp_path, wide).weight(embedding)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"][embedding.name] = "../secret.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="no file beside it"):
        PortableCheckpoint(tmp_path, spec_from_dict(TINY)).weight(embedding)
