"""Emitted files: what the trainer, DeepSpeed and the launchers read back."""

from __future__ import annotations

import json
import os
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from fastllm_planner.arch import preset, to_hf_config
from fastllm_planner.backends import backend
from fastllm_planner.emit import check_targets, emit_plan, write_text
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import Cluster, gpu
from fastllm_planner.layout import Layout
from fastllm_planner.plan import Job, Plan, price_layout


def planned(layout: Layout, n_gpus: int, **changes: object) -> Plan:
    stack = backend(str(changes.pop("stack", "fastllm")))
    cluster = Cluster(gpu("H100-SXM"), n_gpus, min(8, n_gpus))
    job = Job("llama-3-8b", preset("llama-3-8b"), cluster, stack, 64, 4096)
    return price_layout(replace(job, **changes), layout)


LAYOUT = Layout(dp=8, tp=2, micro_batch=4, global_batch=64, seq_len=4096, zero_stage=2)


def test_train_toml_holds_the_layout(tmp_path: Path) -> None:
    target = tmp_path / "train.toml"
    emit_plan(planned(replace(LAYOUT, recompute="full"), 16), target, model="Llama-3-8B")
    config = tomllib.loads(target.read_text(encoding="utf-8"))
    assert config["model"] == {"preset": "llama-3-8b"}
    assert config["parallel"]["recompute"] == "full"
    for name in ("dp", "tp", "pp", "cp", "ep", "virtual_stages", "zero_stage", "offload"):
        assert config["parallel"][name] == getattr(LAYOUT, name)
    assert config["batch"] == {"micro": 4, "global": 64, "seq_len": 4096}
    assert config["precision"] == {"dtype": "bf16"}


def test_a_config_file_is_named_by_its_absolute_path(tmp_path: Path) -> None:
    folder = tmp_path / 'odd "name"'
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(to_hf_config(preset("llama-3-8b"))), encoding="utf-8")
    target = tmp_path / "train.toml"
    emit_plan(planned(LAYOUT, 16), target, model=str(file))
    assert tomllib.loads(target.read_text(encoding="utf-8"))["model"] == {"hf_config": str(file)}


def test_train_toml_is_for_the_trainer_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the plan is for megatron-fused"):
        emit_plan(planned(LAYOUT, 16, stack="megatron-fused"), tmp_path / "a.toml", model="x")
    with pytest.raises(UserError, match="not fp8"):
        emit_plan(planned(LAYOUT, 16, dtype="fp8"), tmp_path / "a.toml", model="x")
    deep = replace(LAYOUT, dp=4, pp=2, virtual_stages=2, zero_stage=1)
    with pytest.raises(UserError, match="does not run virtual_stages=2"):
        emit_plan(planned(deep, 16), tmp_path / "a.toml", model="llama-3-8b")
    assert list(tmp_path.iterdir()) == []


def test_deepspeed_json(tmp_path: Path) -> None:
    target = tmp_path / "deepspeed.json"
    emit_plan(planned(LAYOUT, 16), target, model="llama-3-8b")
    config = json.loads(target.read_text(encoding="utf-8"))
    # DeepSpeed's own rule: train batch = micro-batch × accumulation × data-parallel ranks.
    product = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == product * LAYOUT.dp == 64
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"] == {"enabled": True}
    offloaded = replace(LAYOUT, zero_stage=3, offload="optimizer+params")
    other = planned(offloaded, 16, dtype="fp16", stack="megatron-deepspeed")
    emit_plan(other, target, model="llama-3-8b")
    config = json.loads(target.read_text(encoding="utf-8"))
    assert config["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "bf16" not in config


def test_deepspeed_accepts_the_json(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    target = tmp_path / "deepspeed.json"
    emit_plan(planned(replace(LAYOUT, tp=1), 8), target, model="llama-3-8b")
    raw = json.loads(target.read_text(encoding="utf-8"))
    raw["train_batch_size"] //= LAYOUT.dp  # one process here, not eight
    config = DeepSpeedConfig(raw)
    assert config.zero_optimization_stage == 2
    assert config.gradient_accumulation_steps == 2


@pytest.mark.parametrize("name", ["train.toml", "deepspeed.json", "slurm.sh", "torchrun.sh"])
def test_nothing_is_written_that_the_trainer_refuses(name: str, tmp_path: Path) -> None:
    deep = replace(LAYOUT, dp=4, pp=2, virtual_stages=2, zero_stage=1)
    with pytest.raises(UserError, match="does not run virtual_stages=2"):
        emit_plan(planned(deep, 16), tmp_path / name, model="llama-3-8b")
    with pytest.raises(UserError, match="no deepseek_v3 models"):
        emit_plan(planned(LAYOUT, 16, spec=preset("deepseek-v3")), tmp_path / name, model="x")
    with pytest.raises(UserError, match="8192 positions"):
        emit_plan(planned(LAYOUT, 16, seq_len=16384), tmp_path / name, model="llama-3-8b")
    experts = planned(replace(LAYOUT, ep=2, zero_stage=3), 16, spec=preset("mixtral-8x7b"))
    with pytest.raises(UserError, match="does not run ep=2"):
        emit_plan(experts, tmp_path / name, model="x")
    cut = planned(replace(LAYOUT, dp=1, tp=2, cp=8, zero_stage=1), 16, spec=preset("qwen2.5-7b"))
    with pytest.raises(UserError, match="does not run cp=8"):  # 14 heads on a rank
        emit_plan(cut, tmp_path / name, model="x")
    assert list(tmp_path.iterdir()) == []


def _fake_tools(folder: Path) -> dict[str, str]:
    """``torchrun``, ``srun`` and ``scontrol`` that print or pass on what they are given."""
    tools = {
        "torchrun": 'echo "torchrun $*"',
        "srun": 'shift; SLURM_NODEID=3 exec "$@"',
        "scontrol": "printf 'node-a\\nnode-b\\n'",
    }
    for name, body in tools.items():
        tool = folder / name
        tool.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        tool.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def _bash(script: Path, env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *args], capture_output=True, text=True, check=False, env=env
    )


def test_torchrun_script_runs_every_process_of_the_plan(tmp_path: Path) -> None:
    env = _fake_tools(tmp_path)
    script = tmp_path / "torchrun.sh"
    emit_plan(planned(replace(LAYOUT, dp=4), 8), script, model="llama-3-8b")
    assert os.access(script, os.X_OK)
    done = _bash(script, env, "my config.toml", "optim.lr=1e-4")
    assert done.stdout == (
        "torchrun --standalone --nproc-per-node 8 -m fastllm_train run my config.toml "
        "optim.lr=1e-4\n"
    )
    assert _bash(script, env).returncode != 0
    emit_plan(planned(LAYOUT, 16), script, model="llama-3-8b")
    done = _bash(script, {**env, "NODE_RANK": "1", "MASTER_ADDR": "node-a"}, "c.toml")
    assert "--nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr node-a" in done.stdout
    assert _bash(script, env, "c.toml").returncode != 0  # NODE_RANK is missing


def test_slurm_script_starts_one_torchrun_per_node(tmp_path: Path) -> None:
    env = {**_fake_tools(tmp_path), "SLURM_JOB_NODELIST": "node-[a-b]"}
    script = tmp_path / "slurm.sh"
    emit_plan(planned(replace(LAYOUT, dp=16), 32), script, model="llama-3-8b")
    text = script.read_text(encoding="utf-8")
    assert "#SBATCH --nodes=4\n" in text
    assert "#SBATCH --gpus-per-node=8\n" in text
    done = _bash(script, env, "my config.toml")
    assert done.returncode == 0, done.stderr
    assert "--nnodes 4 --nproc-per-node 8 --node-rank 3 --master-addr node-a" in done.stdout
    assert done.stdout.endswith("-m fastllm_train run my config.toml\n")


def test_targets_are_checked_before_anything_runs(tmp_path: Path) -> None:
    check_targets([tmp_path / "a.toml", tmp_path / "slurm.sh", tmp_path / "b.json"])
    for name in ("plan.yaml", "plan", "missing/train.toml"):
        with pytest.raises(UserError):
            check_targets([tmp_path / name])


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "train.toml"
    write_text(target, "old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        write_text(target, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["train.toml"]
    assert target.read_text(encoding="utf-8") == "old"
