"""``fastllm-train run`` as real processes: a run's folder, resuming, SIGTERM, kill -9."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from train_worker import all_tensors

STEPS = 20
CONFIG = """
[model.arch]
family = "llama"
layers = 2
hidden = 128
heads = 4
kv_heads = 2
head_dim = 32
ffn_hidden = 256
vocab = 512
max_seq_len = 128
[parallel]
dp = 2
zero_stage = 2
[batch]
micro = 4
global = 16
seq_len = 128
[data]
source = "synthetic"
[schedule]
steps = 20
warmup_steps = 4
[optim]
lr = 3e-3
[checkpoint]
every = 10
keep_last = 3
[run]
device = "cpu"
"""


def command(folder: Path, *more: str) -> list[str]:
    config = folder / "config.toml"
    if not config.exists():
        config.write_text(CONFIG)
    out = f"run.out={folder / 'out'}"
    return [sys.executable, "-m", "fastllm_train", "run", str(config), out, *more]


def environment() -> dict[str, str]:
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in left_out}
    return {**env, "OMP_NUM_THREADS": "1"}


def run(folder: Path, *more: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, *more), env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == status, done.stderr[-4000:]
    return done


@contextmanager
def started(folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(folder, *more),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "out/metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def wait_for_step(folder: Path, process: subprocess.Popen[str], step: int) -> None:
    deadline = time.monotonic() + 100
    while not any(record["step"] >= step for record in records(folder, "step")):
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(process: subprocess.Popen[str]) -> list[int]:
    listing = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listing.split()]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by file and path. The files were written by this test."""
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}/{key}", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(f"{name}/{index}", item)

    for file in sorted((folder / f"out/checkpoints/global_step{step}").glob("*.pt")):
        walk(file.name, torch.load(file, weights_only=False))
    return found


def assert_same_end(folder: Path, straight: Path) -> None:
    got, want = tensors(folder, STEPS), tensors(straight, STEPS)
    assert got.keys() == want.keys()
    assert any("exp_avg" in name for name in want)
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert different == []
    last = [r["loss"] for r in records(folder, "step") if r["step"] == STEPS][-1]
    assert last == records(straight, "step")[-1]["loss"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(folder)
    assert done.stdout.startswith(f"trained to step {STEPS}; next: fastllm-train report")
    return folder


@pytest.mark.slow
def test_folder_of_a_run(straight: Path) -> None:
    out = straight / "out"
    (first,) = records(straight, "run")
    steps = records(straight, "step")
    assert first["resumed_from"] is None
    assert first["peak_source"] == "measured GEMM"
    assert first["devices"] == 2
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["consumed_samples"] == STEPS * 16
    assert steps[-1]["consumed_tokens"] == STEPS * 16 * 128
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert (out / "checkpoints/latest").read_text().strip() == "global_step20"
    assert {p.name for p in (out / "checkpoints").iterdir()} == {
        "latest",
        "config.json",
        "global_step10",
        "global_step20",
    }
    hf = json.loads((out / "checkpoints/config.json").read_text())
    assert (hf["model_type"], hf["torch_dtype"]) == ("llama", "float32")
    weights = tensors(straight, STEPS)
    assert "mp_rank_00_model_states.pt/module/model.embed_tokens.weight" in weights


@pytest.mark.slow
def test_sigterm_then_kill_9_then_the_end_is_bit_exact(tmp_path: Path, straight: Path) -> None:
    with started(tmp_path) as process:
        wait_for_step(tmp_path, process, 3)
        process.send_signal(signal.SIGTERM)
        out, log = process.communicate(timeout=100)
    assert process.returncode == 0, log
    stopped_at = records(tmp_path, "step")[-1]["step"]
    assert 3 <= stopped_at < 10
    assert out.startswith(f"stopped at step {stopped_at}; run the same command again")

    with started(tmp_path) as process:
        wait_for_step(tmp_path, process, 12)
        os.kill(sorted(children(process))[1], signal.SIGKILL)
        _, log = process.communicate(timeout=100)
    assert process.returncode == 2, log
    assert "rank 1 was killed by SIGKILL" in log
    assert f"/global_step{stopped_at} at step {stopped_at} " in log

    again = run(tmp_path)
    assert "global_step10 at step 10 (160 samples consumed)" in again.stderr
    assert records(tmp_path, "run")[-1]["resumed_from"] == 10
    assert_same_end(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_torch_engine_s_twenty_steps_are_ten_kill_9_and_ten(tmp_path: Path, dtype: str) -> None:
    """Killed after the checkpoint of step 10: weights, moments and losses end equal to the bit."""
    by_torch = (f"precision.dtype={dtype}", "parallel.zero_stage=0", "speed.engine=torch")
    killed, whole = tmp_path / "killed", tmp_path / "straight"
    for folder in (killed, whole):
        folder.mkdir()
    run(whole, *by_torch)
    with started(killed, *by_torch) as process:
        wait_for_step(killed, process, 13)
        os.kill(sorted(children(process))[0], signal.SIGKILL)
        process.communicate(timeout=100)
    assert process.returncode == 2
    again = run(killed, *by_torch)
    assert "global_step10 at step 10 (160 samples consumed)" in again.stderr
    step = f"out/checkpoints/global_step{STEPS}"
    got, want = all_tensors(killed / step), all_tensors(whole / step)
    assert got.keys() == want.keys()
    assert any(name.startswith("exp_avg_sq/") for name in want)
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
    losses = [
        {r["step"]: (r["loss"], r["grad_norm"]) for r in records(folder, "step")}
        for folder in (killed, whole)
    ]
    assert losses[0] == losses[1]
    assert len(losses[1]) == STEPS


@pytest.mark.slow
def test_ranks_stop_and_save_when_their_launcher_is_killed(tmp_path: Path) -> None:
    with started(tmp_path, "schedule.steps=5000") as process:
        wait_for_step(tmp_path, process, 3)
        ranks = children(process)
        second = run(tmp_path, status=2)
        assert "another run is training in" in second.stderr
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    last = records(tmp_path, "step")[-1]["step"]
    assert (tmp_path / "out/checkpoints/latest").read_text().strip() == f"global_step{last}"


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_named_and_the_last_good_one_used(
    tmp_path: Path, straight: Path
) -> None:
    shutil.copytree(straight / "out", tmp_path / "out")
    newest = tmp_path / "out/checkpoints/global_step20/mp_rank_00_model_states.pt"
    os.truncate(newest, newest.stat().st_size - 1)
    again = run(tmp_path)
    assert "warning: skipped a damaged checkpoint" in again.stderr
    assert "mp_rank_00_model_states.pt has" in again.stderr
    assert records(tmp_path, "run")[-1]["resumed_from"] == 10
    assert_same_end(tmp_path, straight)


@pytest.mark.slow
def test_fresh_starts_again(tmp_path: Path, straight: Path) -> None:
    shutil.copytree(straight / "out", tmp_path / "out")
    fresh = run(tmp_path, "--fresh", "schedule.steps=3", "schedule.warmup_steps=1")
    assert "resumed" not in fresh.stderr
    assert [r["step"] for r in records(tmp_path, "step")] == [1, 2, 3]
    assert [p.name for p in (tmp_path / "out/checkpoints").glob("global*")] == ["global_step3"]


@pytest.mark.slow
def test_divergence_stops_every_rank_and_saves_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "optim.name=sgd", "optim.lr=1e30", "optim.clip=0", status=2)
    assert "training has diverged" in done.stderr
    assert done.stderr.count("error: step") == 1
    assert not list((tmp_path / "out/checkpoints").glob("global_step*"))


@pytest.mark.slow
def test_portable_checkpoint_changes_the_layout_and_deepspeed_s_own_does_not(
    tmp_path: Path, straight: Path
) -> None:
    shutil.copytree(straight / "out", tmp_path / "out")
    tensor_parallel = ("parallel.dp=1", "parallel.tp=2", "schedule.steps=21")
    refused = run(tmp_path, *tensor_parallel, status=2)
    assert "was written by DeepSpeed, which alone reads it" in refused.stderr
    refused = run(tmp_path, *tensor_parallel, "speed.engine=deepspeed", status=2)
    assert "was written in another layout (dp 2 → 1, tp 1 → 2)" in refused.stderr
    assert 'checkpoint.format="portable"' in refused.stderr

    on = run(tmp_path, "schedule.steps=21", "checkpoint.format=portable")
    assert "resumed from" in on.stderr
    newest = tmp_path / "out/checkpoints/global_step21"
    assert (newest / "model.safetensors.index.json").is_file()
    changed = run(tmp_path, "parallel.dp=1", "parallel.tp=2", "schedule.steps=23")
    assert f"resumed from {newest} at step 21 (336 samples consumed)" in changed.stderr
    assert records(tmp_path, "step")[-1]["step"] == 23
    assert records(tmp_path, "step")[-1]["loss"] < records(straight, "step")[0]["loss"] - 0.5
    # Alone in its replica, the layout is the torch engine's.
    assert (tmp_path / "out/checkpoints/global_step23/state.json").is_file()
