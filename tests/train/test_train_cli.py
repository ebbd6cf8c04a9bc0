"""The command line: check, report, peak, errors, launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rank_job import free_port
from train_layouts import TINY

from fastllm_planner.arch import count_params, spec_from_dict
from fastllm_planner.flops import model_flops_per_token
from fastllm_train.__main__ import main
from fastllm_train.cli.app import VERBS, VerbGroup
from fastllm_train.report import read_metrics, report
from fastllm_train.toml_text import to_toml

CONFIG = {
    "model": {"arch": TINY},
    "parallel": {"dp": 2, "zero_stage": 0},
    "batch": {"micro": 1, "global": 4, "seq_len": 32},
    "data": {"source": "synthetic"},
    "schedule": {"steps": 2},
    "precision": {"dtype": "bf16"},
    "run": {"device": "cpu", "seed": 3},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(CONFIG))
    return path


def test_check_shows_the_layout_and_deepspeed_s_configuration(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_deepspeed = "speed.engine=deepspeed"
    assert main(["check", str(config), by_deepspeed, "batch.micro=2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["params"] == count_params(spec_from_dict(TINY))
    assert shown["world_size"] == 2
    assert shown["accumulation"] == 1
    assert shown["zero_stage"] == 1
    assert "takes a step at set-up" in shown["zero_note"]
    assert shown["deepspeed_config"]["train_micro_batch_size_per_gpu"] == 2
    assert shown["deepspeed_config"]["bf16"] == {"enabled": True}
    assert main(["check", str(config), by_deepspeed]) == 0
    assert "ZeRO stage          1 (asked for 0" in capsys.readouterr().out


def test_check_names_the_engine_and_why(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(config), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["engine"], shown["zero_stage"], shown["zero_note"]) == ("torch", 0, "")
    assert shown["deepspeed_config"] is None
    assert main(["check", str(config)]) == 0
    assert "DeepSpeed" not in capsys.readouterr().out
    alone = ["parallel.dp=1", "parallel.tp=2", "parallel.zero_stage=3"]
    assert main(["check", str(config), *alone]) == 0
    shown = capsys.readouterr().out
    assert "engine              torch\n" in shown
    assert "ZeRO stage          0 (asked for 3: one replica: nothing is cut)" in shown
    assert main(["check", str(config), "parallel.zero_stage=2"]) == 0
    assert "engine              deepspeed, for parallel.zero_stage=2" in capsys.readouterr().out
    assert main(["check", str(config), "speed.engine=torch", "parallel.zero_stage=2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: speed.engine="torch": parallel.zero_stage=2 is DeepSpeed\'s\n')


def test_training_without_deepspeed_does_not_import_it(config: Path, tmp_path: Path) -> None:
    """Nor torch's compiler: seconds of a start, and memory."""
    text = (
        "import sys, os\n"
        "os._exit = lambda status: sys.exit(status)\n"
        "from fastllm_train.__main__ import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print({n for n in ('deepspeed', 'torch._dynamo', 'sympy') if n in sys.modules})\n"
    )
    command = ["run", str(config), "parallel.dp=1", f"run.out={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-c", text, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("set()\n"), done.stdout


def test_errors_are_two_lines_and_exit_2(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(config), "optim.lrr=3"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: unknown key optim.lrr\nhint: did you mean optim.lr?\n"
    assert main(["chek", str(config)]) == 2
    assert "did you mean 'check'?" in capsys.readouterr().err
    assert main(["report", "nowhere"]) == 2
    assert "cannot read nowhere/metrics.jsonl" in capsys.readouterr().err


def test_verbs_line_up_with_their_modules() -> None:
    import importlib

    group = VerbGroup("x")
    for name in VERBS:
        command = group.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        assert (
            command
            is importlib.import_module(f"fastllm_train.cli.{name.replace('-', '_')}").command
        )
        assert command.name == name


def test_help_starts_quickly_without_torch() -> None:
    code = "import sys, fastllm_train.__main__; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_peak_counts_two_n_cubed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peak", "--device", "cpu", "--threads", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["threads"] == 1
    assert 0.001 < shown["gemm_tflops"] < 1.0  # one CPU core: 1 GFLOP/s to 1 TFLOP/s
    assert shown["datasheet_tflops"] is None


def step(number: int, seconds: float, loss: float) -> dict[str, object]:
    return {
        "kind": "step", "step": number, "loss": loss, "grad_norm": 1.0, "lr": 0.1, "tokens": 100,
        "consumed_tokens": 100 * number, "consumed_samples": number, "step_time_s": seconds,
        "tokens_per_s": 100 / seconds, "tokens_per_s_per_device": 50 / seconds,
        "model_tflops_full": 2 / seconds, "model_tflops_causal": 1 / seconds,
        "hardware_tflops": 3 / seconds, "mfu_full_pct": 10 / seconds, "peak_mem_gib": 0.5,
        "phase_s": {"data": 0.25 * seconds, "forward": 0.5 * seconds},
    }  # fmt: skip


def run_line(resumed: int | None) -> dict[str, object]:
    return {
        "kind": "run", "schema": 1, "params": 7, "device": "cpu", "devices": 2, "dtype": "fp32",
        "parallel": {}, "batch": {}, "peak_tflops": 0.5, "peak_source": "measured GEMM",
        "resumed_from": resumed,
    }  # fmt: skip


def test_report_skips_warm_up_and_counts_a_repeated_step_once(tmp_path: Path) -> None:
    lines = [run_line(None), *(step(n, 9.0, 5.0 - n) for n in (1, 2))]
    lines += [step(n, 2.0, 5.0 - n) for n in (3, 4)]
    lines += [run_line(2), *(step(n, 9.0, 4.5 - n) for n in (3, 4)), step(5, 4.0, 1.0)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    values = report(read_metrics(tmp_path / "metrics.jsonl"), warm_up=2)
    assert (values["timed_steps"], values["skipped_steps"], values["restarts"]) == (1, 4, 1)
    assert values["step_time_s"] == 4.0
    assert values["tokens_per_s"] == 25.0
    assert (values["loss_first"], values["loss_last"], values["loss_min"]) == (4.0, 1.0, 0.5)
    assert values["phase_share_pct"] == {"data": 25.0, "forward": 50.0, "other": 25.0}
    everything = report(read_metrics(tmp_path / "metrics.jsonl"), warm_up=50)
    assert (everything["timed_steps"], everything["skipped_steps"]) == (5, 0)


@pytest.mark.slow
def test_deepspeed_s_launcher(config: Path, tmp_path: Path) -> None:
    """torchrun's: test_launch."""
    folder = Path(sys.executable).parent
    out = tmp_path / "out"
    command = [
        sys.executable, str(folder / "deepspeed"), "--num_accelerators", "2", "--master_port",
        str(free_port()), "--no_local_rank", "--module", "fastllm_train", "run", str(config),
        f"run.out={out}",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in metrics.steps] == [1, 2]
    assert metrics.runs[0]["devices"] == 2
    last = metrics.steps[-1]
    flops = model_flops_per_token(spec_from_dict(TINY), 32, "full")
    per_device = last["tokens_per_s_per_device"] * flops / 1e12
    assert last["model_tflops_full"] == pytest.approx(per_device)
    mfu = 100 * per_device / metrics.runs[0]["peak_tflops"]
    assert last["mfu_full_pct"] == pytest.approx(mfu)
