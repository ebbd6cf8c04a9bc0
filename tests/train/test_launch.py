"""``launch``: restarts under torchrun after kill -9, and the files for a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rank_job import free_port
from train_layouts import TINY

from fastllm_train.__main__ import main
from fastllm_train.toml_text import to_toml

STEPS = 30
CONFIG = {
    "model": {"arch": TINY},
    "parallel": {"dp": 2, "zero_stage": 1},
    "batch": {"micro": 1, "global": 4, "seq_len": 32},
    "data": {"source": "synthetic"},
    "schedule": {"steps": STEPS},
    "checkpoint": {"every": 5},
    "run": {"device": "cpu"},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(to_toml({**CONFIG, "run": {"device": "cpu", "out": str(tmp_path / "out")}}))
    return path


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == kind]


def ranks_of(launcher: int) -> list[int]:
    """Processes of the job, by rank."""
    found: dict[int, int] = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        try:
            items = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(i.removeprefix(b"RANK=")): int(pid) for i in items if i.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


def kill_a_rank_and_wait(agents: list[list[str]], env: dict[str, str], out: Path) -> None:
    """Start the agents of a job; kill the last rank of the last one behind the first checkpoint.
    All ranks start again, resume, and train to the end."""
    processes = [
        subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for command in agents
    ]
    try:
        deadline = time.monotonic() + 120
        while not records(out, "checkpoint"):
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(ranks_of(processes[-1].pid)[-1], signal.SIGKILL)
        logs = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log[-4000:]
    first, second = records(out, "run")
    assert (first["resumed_from"], second["resumed_from"] % 5) == (None, 0)
    assert second["resumed_from"] >= 5
    assert {r["step"] for r in records(out, "step")} == set(range(1, STEPS + 1))
    assert (out / "checkpoints/latest").read_text().strip() == f"global_step{STEPS}"


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_finishes(config: Path, tmp_path: Path) -> None:
    """By ``launch``, which becomes torchrun."""
    command = [sys.executable, "-m", "fastllm_train", "launch", str(config), "--max-restarts", "1"]
    kill_a_rank_and_wait([command], {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "out")


@pytest.mark.thorough
def test_torchrun_starts_a_killed_rank_again(config: Path, tmp_path: Path) -> None:
    """Called as its users do, without ``--standalone``."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    how = ["--nproc-per-node=2", "--max-restarts=1", *address]
    command = [torchrun, *how, "-m", "fastllm_train", "run", str(config)]
    kill_a_rank_and_wait([command], {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "out")


@pytest.mark.thorough
def test_two_nodes_torchrun_start_a_killed_rank_again(config: Path, tmp_path: Path) -> None:
    """By the file that ``launch`` writes; the two nodes are this one."""
    assert main(["launch", str(config), "--nodes", "2", "--out", str(tmp_path)]) == 0
    script = tmp_path / "torchrun.sh"
    here = script.read_text().replace(":29500", f":{free_port()}")
    script.write_text(here.replace("--nnodes=2", "--nnodes=2 --local-addr=127.0.0.1"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PATH": path}
    kill_a_rank_and_wait([["bash", str(script)]] * 2, env, tmp_path / "out")


SRUN = """#!{python}
# Slurm's srun, of what is used: every task in turn gets its numbers.
import os, subprocess, sys
command = [w for w in sys.argv[1:] if not w.startswith("--kill")]
tasks = [
    subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
def test_slurm_s_script_trains(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    assert main(["launch", str(config), "schedule.steps=2", "--write", "--out", str(files)]) == 0
    names = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    assert names == {"job.sbatch", "torchrun.sh", "deepspeed.sh", "hostfile"}
    stands_in = tmp_path / "bin"
    stands_in.mkdir()
    (stands_in / "srun").write_text(SRUN.format(python=sys.executable))
    (stands_in / "scontrol").write_text("#!/bin/sh\necho 127.0.0.1\n")
    for file in stands_in.iterdir():
        file.chmod(0o755)
    script = files / "job.sbatch"
    script.write_text(script.read_text().replace("29500", str(free_port())))
    path = f"{stands_in}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1"}
    env = {**os.environ, **slurm, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert records(tmp_path / "out", "run")[0]["devices"] == 2
    assert [r["step"] for r in records(tmp_path / "out", "step")] == [1, 2]


def test_files_for_several_nodes(config: Path, tmp_path: Path) -> None:
    arguments = ["launch", str(config), "parallel.dp=16", "batch.global=16", "run.device=auto"]
    assert main([*arguments, "--nodes", "4", "--max-restarts", "7", "--out", str(tmp_path)]) == 0
    script = (tmp_path / "job.sbatch").read_text()
    for line in ("--nodes=4", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=TERM@300"):
        assert f"#SBATCH {line}\n" in script
    for file in ("job.sbatch", "torchrun.sh", "deepspeed.sh"):
        subprocess.run(["bash", "-n", tmp_path / file], check=True)
        assert "batch.global=16" in (tmp_path / file).read_text()
    assert "--nnodes=4 --nproc-per-node=4" in (tmp_path / "torchrun.sh").read_text()
    assert "--max-restarts=7" in (tmp_path / "torchrun.sh").read_text()
    assert (tmp_path / "hostfile").read_text().count("slots=4") == 4


def test_nodes_that_do_not_divide_the_processes_are_refused(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", str(config), "--nodes", "3"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: 2 processes (dp*tp*pp*cp) do not divide over 3 nodes\n")
