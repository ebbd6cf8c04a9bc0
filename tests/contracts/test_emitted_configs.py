"""The planner emits what the trainer runs: no more, and no less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastllm_planner.__main__ import main
from fastllm_planner.arch import preset, preset_names
from fastllm_planner.backends import backend
from fastllm_planner.trainer import TRAINER_FAMILIES, TRAINER_SIZES

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.toml"
PLAN = "plan --model llama-10m --gpu H100-SXM --gpus 8 --global-batch 16 --seq-len 256"


def check(*overrides: str) -> subprocess.CompletedProcess[str]:
    """``fastllm-train check`` of the quickstart's config with changes."""
    command = [sys.executable, "-m", "fastllm_train", "check", str(QUICKSTART), *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("fixed", ["tp=1", "tp=2", "zero-stage=3", "recompute=full"])
def test_the_trainer_takes_what_is_emitted(fixed: str, tmp_path: Path) -> None:
    target = tmp_path / "train.toml"
    assert main([*PLAN.split(), "--fix", fixed, "--emit", str(target)]) == 0
    done = check(f"base={target}", "precision.dtype=bf16")
    assert done.returncode == 0, done.stderr


def test_the_axes_held_at_1_are_those_that_the_trainer_refuses(tmp_path: Path) -> None:
    target = tmp_path / "train.toml"
    assert main([*PLAN.split(), "--emit", str(target)]) == 0
    for axis in TRAINER_SIZES:
        done = check(f"base={target}", "parallel.dp=2", f"parallel.{axis}=2")
        assert done.returncode == 2, f"the trainer runs {axis}=2: remove it from TRAINER_SIZES"
        assert axis in done.stderr


@pytest.mark.parametrize("name", preset_names())
def test_the_planner_emits_for_the_families_that_the_trainer_has(name: str) -> None:
    from fastllm_train.errors import UserError
    from fastllm_train.models.supported import check_supported

    try:
        check_supported(preset(name))
        trainable = True
    except UserError:
        trainable = False
    assert (preset(name).family in TRAINER_FAMILIES) == trainable


@pytest.mark.parametrize(
    "fixed", ["zero-stage=1", "zero-stage=2", "zero-stage=3", "offload=optimizer"]
)
def test_the_emitted_deepspeed_config_is_the_trainers(fixed: str, tmp_path: Path) -> None:
    """Batch, precision, ZeRO and offload as fastllm-train gives them to DeepSpeed, and nothing that
    would change what the planner counts: fp32 gradients would come with ``data_types``."""
    from fastllm_train.config import load_config
    from fastllm_train.deepspeed_config import deepspeed_config

    emitted, train = tmp_path / "deepspeed.json", tmp_path / "train.toml"
    command = [*PLAN.split(), "--fix", fixed, "--emit", str(emitted), "--emit", str(train)]
    assert main(command) == 0
    planned = json.loads(emitted.read_text())
    ours = deepspeed_config(load_config(train, ['data.source="synthetic"']))
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "bf16", "data_types",
                "gradient_accumulation_steps"):  # fmt: skip
        assert planned.get(key) == ours.get(key), key
    for key in ("stage", "offload_optimizer", "offload_param"):
        mine, theirs = planned["zero_optimization"], ours["zero_optimization"]
        assert mine.get(key) == theirs.get(key), key
    counted = backend("fastllm").bf16_extra_grad_bytes
    assert (counted > 0) == (ours.get("data_types", {}).get("grad_accum_dtype") == "fp32")
