"""Offload to files: trains like memory does, resumes to the bit, and is refused where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_layouts import (
    ADAMW,
    Trajectory,
    tiny_arch,
    tiny_config,
)
from train_worker import run_layouts

from fastllm_train import deepspeed_nvme
from fastllm_train.config import Config
from fastllm_train.deepspeed_config import deepspeed_config
from fastllm_train.errors import UserError
from fastllm_train.refusals import refuse
from fastllm_train.toml_text import to_toml

# Each with one precision: the other two pairs say nothing new.
OFFLOADS = {"optimizer": "fp32", "optimizer+params": "bf16"}
# DeepSpeed leaves in memory what is below 1 MiB: most tensors here are above it.
ARCH = {
    **tiny_arch("llama"),
    "hidden": 512,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 64,
    "ffn_hidden": 1408,
    "vocab": 4096,
}


reads_files = pytest.mark.skipif(
    os.environ.get("FASTLLM_TEST_NVME") != "1",
    reason="make test-nvme: DeepSpeed compiles its async_io for minutes, and needs libaio-dev",
)


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trajectory]:
    folder = tmp_path_factory.mktemp("nvme")
    configs: dict[str, Config] = {}
    for offload, dtype in OFFLOADS.items():
        parallel = {"dp": 2, "zero_stage": 3, "offload": offload}
        nvme = {**parallel, "nvme_path": str(folder / "swap")}
        more: dict[str, Any] = {"model": {"arch": ARCH}, "optim": ADAMW}
        more |= {"precision": {"dtype": dtype}, "run": {"out": str(folder / offload)}}
        configs[f"{offload} memory"] = tiny_config(parallel=parallel, **more)
        for action in ("save", "again", "load"):
            configs[f"{offload}: {action}"] = tiny_config(parallel=nvme, **more)
    trajectories = run_layouts(configs, folder)
    written = [f.name for f in (folder / "swap").rglob("*.swp") if "gradient" not in f.name]
    assert any("exp_avg_sq" in name for name in written)
    assert any("param" in name for name in written)
    return trajectories


@reads_files
@pytest.mark.parametrize("offload", OFFLOADS)
def test_equals_offload_to_memory(offload: str, trajectories: dict[str, Trajectory]) -> None:
    """To the bit; that one equals one process (``test_data_parallel``)."""
    files, memory = trajectories[f"{offload}: save"], trajectories[f"{offload} memory"]
    assert files.losses == memory.losses
    _assert_equal(files.weights, memory.weights)


@reads_files
@pytest.mark.parametrize("action", ["load", "again"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_resumes_and_goes_back_to_the_bit(
    offload: str, action: str, trajectories: dict[str, Trajectory]
) -> None:
    """From a checkpoint into a new engine, and in the middle of a run."""
    straight, other = trajectories[f"{offload}: save"], trajectories[f"{offload}: {action}"]
    assert other.losses[-2:] == straight.losses[-2:]
    _assert_equal(other.weights, straight.weights)


def _assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@reads_files
def test_a_run_removes_its_files(tmp_path: Path) -> None:
    swap = tmp_path / "swap"
    config = tmp_path / "config.toml"
    table: dict[str, Any] = {
        "model": {"arch": ARCH},
        "parallel": {"zero_stage": 3, "offload": "optimizer", "nvme_path": str(swap)},
        "batch": {"micro": 1, "global": 1, "seq_len": 32},
        "schedule": {"kind": "constant", "steps": 1},
        "data": {"source": "synthetic"},
        "run": {"out": str(tmp_path / "out")},
    }
    config.write_text(to_toml(table))
    command = [sys.executable, "-m", "fastllm_train", "run", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"offload to files in {swap}" in done.stderr
    assert list(swap.iterdir()) == []


@pytest.mark.parametrize(
    ("parallel", "more", "said"),
    [
        ({"offload": "none"}, {}, "there is none"),
        ({"zero_stage": 2}, {}, "needs zero_stage=3, not 2"),
        ({}, {"precision": {"dtype": "fp16"}}, "not for fp16"),
        ({}, {"checkpoint": {"format": "deepspeed"}}, "do not bring back states"),
    ],
)
def test_refused(parallel: dict[str, Any], more: dict[str, Any], said: str) -> None:
    wanted = {"zero_stage": 3, "offload": "optimizer", "nvme_path": "/nvme", **parallel}
    config = tiny_config(parallel=wanted, **more)
    with pytest.raises(UserError, match=said):
        refuse(config, config.model.resolve())


def test_without_libaio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # There is no job whose rank 0 could speak.
    monkeypatch.setattr("fastllm_train.coordination.say", print)
    builder = type(deepspeed_nvme._builder())
    monkeypatch.setattr(builder, "is_compatible", lambda *_, **__: False)
    parallel = {"zero_stage": 3, "offload": "optimizer", "nvme_path": str(tmp_path)}
    with pytest.raises(UserError, match="libaio is missing") as raised:
        deepspeed_nvme.prepare(tiny_config(parallel=parallel))
    assert "libaio-dev" in (raised.value.hint or "")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    parallel = {"zero_stage": 3, "offload": "optimizer", "nvme_path": str(file)}
    with pytest.raises(UserError, match="Not a directory"):
        deepspeed_nvme.prepare(tiny_config(parallel=parallel))


def test_buffers_hold_the_largest_part() -> None:
    """Two runs do not share a folder; a rank's buffers hold its part of the largest parameter."""
    parallel = {
        "dp": 4,
        "zero_stage": 3,
        "offload": "optimizer+params",
        "nvme_path": "/nvme",
    }
    batch = {"micro": 1}
    config = tiny_config(model={"arch": ARCH}, parallel=parallel, batch=batch)
    zero = deepspeed_config(config)["zero_optimization"]
    largest = 1408 * 512
    assert zero["offload_param"]["buffer_size"] >= largest / 4
    assert zero["offload_param"]["buffer_size"] % 4096 == 0
    other = tiny_config(parallel=parallel, batch=batch, run={"out": "elsewhere"})
    assert deepspeed_nvme.swap_folder(config) != deepspeed_nvme.swap_folder(other)
