"""``plan`` and ``estimate``: verdict first, every figure consistent, exit 0/1/2."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastllm_planner.__main__ import main
from fastllm_planner.arch import preset, to_hf_config
from fastllm_planner.plan import default_batch

PLAN_8B = "plan --model llama-3-8b --gpu H100-SXM --gpus 64 --global-batch 1024 --tokens 1e12"


def run(command: str, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    status = main([*command.split(), *more])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def run_json(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    status, out, _ = run(command, capsys, "--json")
    assert status == 0
    return json.loads(out)


def test_the_verdict_comes_first_and_sections_follow(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(PLAN_8B + " --price 2.5", capsys)
    assert status == 0
    assert err == ""
    assert re.match(
        r"llama-3-8b on 64 × H100-SXM fits: [\d.]+ of 79\.\d GiB on the fullest rank.*, about "
        r"\d+% MFU \(full attention\), [\d.]+ days for 1T tokens\.\n",
        out,
    )
    words = ("Strategy:", "Memory per rank", "Step ", "Speed ", "TFLOPs ", "MFU ", "Training ")
    words += ("Cost ", "Best strategies", "Assumptions")
    places = [out.index("\n" + word) for word in words]
    assert places == sorted(places)
    assert "full attention" in out
    assert "causal" in out
    assert "of 989 TFLOPs" in out


def test_json_figures_agree_with_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(PLAN_8B + " --price 2 --goodput 0.8 --top-k 3", capsys)
    assert data["schema"] == 1
    assert data["fits"] is True
    assert len(data["plans"]) == 3
    for plan in data["plans"]:
        step, layout = plan["step_seconds"], plan["layout"]
        assert layout["dp"] * layout["tp"] * layout["pp"] * layout["cp"] == 64
        assert plan["required_bytes"] == max(stage["required"] for stage in plan["stages"])
        for stage in plan["stages"]:
            assert sum(stage["at_peak"].values()) == pytest.approx(stage["required"])
            assert stage["allocated"] < stage["required"] <= stage["total"]
        assert sum(stage["layers"] for stage in plan["stages"]) == 32
        parts = [key for key in step if key.endswith("comm")]
        parts += ["compute", "recompute", "bubble", "optimizer", "offload", "overhead"]
        assert sum(step[part] for part in parts) == pytest.approx(step["total"], rel=1e-9)
        seconds = 1e12 / (1024 * data["job"]["seq_len"]) * step["total"]
        assert plan["days"] == pytest.approx(seconds / 86400 / 0.8)
        assert plan["gpu_hours"] == pytest.approx(plan["days"] * 24 * 64)
        assert plan["cost"] == pytest.approx(2 * plan["gpu_hours"])
        assert plan["days_range"][0] < plan["days"] < plan["days_range"][1]
        rate = 1024 * data["job"]["seq_len"] / step["total"] / 64
        assert plan["tokens_per_s_per_gpu"] == pytest.approx(rate)
        assert plan["mfu_full_pct"] == pytest.approx(100 * step["model_tflops_full"] / 989)


def test_a_config_json_plans_like_its_preset(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_hf_config(preset("llama-3-8b"))), encoding="utf-8")
    by_name = run_json(PLAN_8B, capsys)
    by_file = run_json(PLAN_8B.replace("llama-3-8b", str(file)), capsys)
    assert by_file["plans"] == by_name["plans"]


@pytest.mark.parametrize("spelling", ["config.json", ".", "{folder}", "{folder}/config.json"])
def test_a_folder_names_its_model(
    spelling: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = json.dumps(to_hf_config(preset("llama-3-8b")))
    (folder / "config.json").write_text(config, encoding="utf-8")
    monkeypatch.chdir(folder)
    model = spelling.format(folder=folder)
    status, out, _ = run(PLAN_8B.replace("llama-3-8b", model), capsys)
    assert status == 0
    assert out.startswith("my-model on 64 × H100-SXM")


def test_a_hostile_folder_name_stays_a_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "x\ntouch owned\n#SBATCH --uid=0"
    folder.mkdir()
    config = json.dumps(to_hf_config(preset("llama-3-8b")))
    (folder / "config.json").write_text(config, encoding="utf-8")
    script, toml = tmp_path / "slurm.sh", tmp_path / "train.toml"
    command = ["plan", "--model", str(folder), *PLAN_8B.split()[3:]]
    assert main([*command, "--emit", str(script), "--emit", str(toml)]) == 0
    capsys.readouterr()
    lines = script.read_text(encoding="utf-8").splitlines()
    assert all(not line.startswith(("touch", "#SBATCH --uid")) for line in lines)
    config_read = tomllib.loads(toml.read_text(encoding="utf-8"))
    assert config_read["model"] == {"hf_config": str(folder)}


def test_estimate_of_the_planned_layout_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(PLAN_8B, capsys)
    chosen = data["plans"][0]
    layout = chosen["layout"]
    names = ("dp", "tp", "pp", "virtual_stages", "cp", "ep", "zero_stage", "micro_batch")
    flags = " ".join(f"--{name.replace('_', '-')} {layout[name]}" for name in names)
    flags += f" --recompute {layout['recompute']} --offload {layout['offload']}"
    if not layout["sequence_parallel"]:
        flags += " --no-sequence-parallel"
    estimated = run_json(PLAN_8B.replace("plan ", "estimate ") + " " + flags, capsys)
    assert estimated["plan"] == chosen


def test_fixed_axes_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(PLAN_8B + " --fix tp=4 --fix zero-stage=1 --fix recompute=full", capsys)
    for plan in data["plans"]:
        layout = plan["layout"]
        assert (layout["tp"], layout["zero_stage"], layout["recompute"]) == (4, 1, "full")
    status, out, _ = run(PLAN_8B + " --fix tp=4 --fix sequence-parallel=true", capsys)
    assert "\nSearched with tp=4, sequence_parallel=true only.\n" in out
    status, out, _ = run(PLAN_8B + " --fix tp=3", capsys)
    assert status == 1
    assert "cannot run" in out


def test_explain_groups_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(
        "plan --model llama-2-70b --gpu A100-80G --gpus 32 --global-batch 128 --explain", capsys
    )
    assert status == 0
    assert "Not listed" in out
    out = " ".join(out.split())  # long reasons wrap
    assert "too little device memory" in out
    assert "ZeRO-2 does not work with pipeline parallelism" in " ".join(out.split())
    assert "e.g. ZeRO-" in out


def test_exit_1_when_nothing_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "train.toml"
    status, out, _ = run(
        "plan --model llama-2-70b --gpu RTX-4090 --gpus 1 --global-batch 8",
        capsys,
        *("--emit", str(target)),
    )
    assert status == 1
    assert out.startswith("llama-2-70b on 1 × RTX-4090 does not fit: the leanest layout needs")
    assert not target.exists()


def test_the_host_can_be_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    command = "plan --model llama-3-8b --gpu RTX-4090 --gpus 1 --global-batch 8 --host-memory"
    status, out, _ = run(command + " 100", capsys)
    assert status == 1
    assert re.search(r"and \d+ GiB of 100 GiB in each node's memory", out)
    status, out, _ = run(command + " 400", capsys)
    assert status == 0
    assert "optimizer and params offloaded" in out


def test_long_pipelines_leave_stages_out(capsys: pytest.CaptureFixture[str]) -> None:
    command = "estimate --model llama-3.1-405b --gpu H100-SXM --gpus 1024 --seq-len 8192"
    command += " --backend megatron-fused --tp 8 --pp 32 --global-batch 512"
    _, out, _ = run(command, capsys)
    assert "Stages 6 to 25 are left out" in out
    table = out.split("needed\n")[1].split("\nStages")[0].splitlines()[1:]
    assert [line.split()[0] for line in table] == [*"012345", *map(str, range(26, 32))]


def test_estimate_exits_1_for_a_layout_that_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    command = "estimate --model llama-2-70b --gpu H100-SXM --gpus 64 --global-batch 64"
    status, out, _ = run(command + " --tp 8 --pp 8 --zero-stage 3", capsys)
    assert status == 1
    assert out.startswith("llama-2-70b: this layout cannot run:\n  - ZeRO-3 does not work with")
    status, out, _ = run(command + " --zero-stage 1", capsys)
    assert status == 1
    assert "does not fit" in out.splitlines()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--gpu H100-SMX", "did you mean 'H100-SXM'"),
        ("--model llama-3-8", "did you mean 'llama-3-8b'"),
        ("--backend fastlm", "did you mean 'fastllm'"),
        ("--gpus 0", "--gpus"),
        ("--gpus -3", "--gpus"),
        ("--dtype fp8 --gpu A100-80G", "fp8"),
        ("--goodput 1.5", "goodput"),
        ("--headroom 1", "headroom"),
        ("--headroom nan", "headroom"),
        ("--seq-len 99999999999", "limited"),
        ("--profile missing.json", "missing.json"),
        ("--emit out.xyz", "says no format"),
        ("--emit no/such/folder/train.toml", "no folder"),
        ("--network none", "--network"),
        ("--global_batch 3", "--global_batch"),
        ("--model gpt2 --seq-len 4096", "learned positions"),
        ("--fix zero=1", "did you mean zero_stage"),
        ("--fix tp", "not AXIS=VALUE"),
        ("--fix tp=0", "positive whole number"),
        ("--fix recompute=half", "one of none, selective, full"),
    ],
)
def test_bad_input_is_one_error_line(
    change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(f"{PLAN_8B} {change}", capsys)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) <= 2


def test_the_quickstart_plans_two_processes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "train.toml"
    command = (
        "plan --model llama-10m --gpu cpu --gpus 2 --dtype fp32 --global-batch 16 --seq-len 256"
    )
    status, out, err = run(command, capsys, "--emit", str(target))
    assert status == 0
    assert "2 CPU processes of this machine fits" in out
    assert "MFU" not in out.splitlines()[0]  # nobody measured this machine's peak
    # The emitted file names no data: the next command does.
    follow = f"next: fastllm-train check {target} 'data.paths=[\"PREFIX\"]'"
    assert err.splitlines() == [f"wrote {target}", follow]
    config = tomllib.loads(target.read_text(encoding="utf-8"))
    assert config["model"] == {"preset": "llama-10m"}
    parallel, batch = config["parallel"], config["batch"]
    assert (parallel["dp"], parallel["tp"], parallel["pp"], parallel["cp"]) == (2, 1, 1, 1)
    assert (parallel["zero_stage"], parallel["offload"]) == (1, "none")
    assert (batch["global"], batch["seq_len"]) == (16, 256)
    assert 16 % (2 * batch["micro"]) == 0
    assert config["precision"] == {"dtype": "fp32"}


def test_the_plan_says_what_the_trainer_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    plain = "plan --model mixtral-8x7b --gpu H100-SXM --gpus 64"
    _, out, _ = run(plain, capsys)
    assert "EP 8" in out
    assert "fastllm-train" not in out
    command = f"{plain} --fix zero-stage=3"
    status, out, _ = run(command, capsys)
    out = " ".join(out.split())
    assert status == 0
    assert "fastllm-train cannot run ep=8 yet; the best it can run: ZeRO-3, DP" in out
    assert "cannot run ep=8" in run_json(command, capsys)["trainer"]
    _, out, _ = run(f"{command} --backend megatron-fused", capsys)
    assert "fastllm-train" not in out
    _, out, _ = run(f"{command} --fix ep=1 --fix tp=1 --fix pp=1", capsys)
    assert "fastllm-train" not in out


def test_the_plan_says_where_a_sequence_is_too_long_to_train(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = f"{PLAN_8B} --seq-len 16384"
    _, out, _ = run(command, capsys)
    assert "takes no sequences of 16384 tokens" in " ".join(out.split())
    target = tmp_path / "slurm.sh"
    status, out, err = run(command, capsys, "--emit", str(target))
    assert (status, out) == (2, "")
    assert "8192 positions" in err
    assert not target.exists()


def test_what_nobody_validated_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run("estimate --model llama-3-8b --gpu H100-SXM --gpus 8", capsys)
    assert "No published series measured fastllm" in out
    assert "ixtures of experts" not in out
    command = "estimate --model mixtral-8x7b --gpu H100-SXM --gpus 64 --ep 8 --backend nemo"
    _, out, _ = run(command, capsys)
    assert "No published series" not in out
    assert "Mixtures of experts were compared with 15" in out


def test_sizes_that_cannot_be_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    command = "estimate --model llama-3-8b --gpu H100-SXM --gpus 64"
    status, _, err = run(f"{command} --tp 3", capsys)
    assert status == 2
    assert "tp x pp x cp = 3 x 1 x 1 does not divide 64 GPUs" in err
    assert "32 heads: one of 1, 2, 4, 8, 16, 32\n" in err
    status, out, _ = run("plan --model llama-3-8b --gpu H100-SXM --gpus 8 --fix tp=16", capsys)
    assert status == 1
    assert "no dp x tp x pp x cp = 8 has the sizes asked for" in out


def test_models_and_gpus_list(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("models", capsys)
    assert status == 0
    assert re.search(r"llama-2-70b +68,976,648,192", out)
    status, out, _ = run("models deepseek-v3 --json", capsys)
    assert json.loads(out)["active_params"] == 37_552_297_472
    status, out, _ = run("gpus", capsys)
    assert status == 0
    assert "H100-SXM" in out
    assert "\ncpu " in out
    assert "H100-SXM" in run_json("gpus", capsys)["gpus"]


def test_a_first_row_that_is_not_the_fastest_is_explained() -> None:
    from fastllm_planner.plan import price_layout
    from fastllm_planner.plan_text import render_alternatives
    from fastllm_planner.search import search

    from .jobs import job

    question = job("llama-3-8b", "H100-SXM", 8, "fastllm")
    found = [price_layout(question, c.layout) for c in search(question, top_k=3).ranked]
    found.sort(key=lambda plan: plan.step.total)
    assert found[0].step.total < found[-1].step.total
    assert "within 2%" not in render_alternatives(found)
    assert "#1 is the simplest of those within 2%" in render_alternatives(found[::-1])


@pytest.mark.parametrize("gpus", [1, 3, 8, 13, 1000, 1024, 8192, 16384, 100_000])
def test_the_default_batch_is_about_four_million_tokens(gpus: int) -> None:
    """On any number of devices; most of them at least share the sequences out evenly."""
    batch = default_batch(4096, gpus)
    assert 2.5e6 < 4096 * batch < 7e6
    assert math.gcd(batch, gpus) >= min(gpus, 1024) / 8


def test_a_prime_number_of_devices_gets_a_batch_it_can_share() -> None:
    assert default_batch(4096, 1009) == 1009
    assert default_batch(4096, 8191) % 8191 == 0


def test_an_axis_is_fixed_once(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(PLAN_8B, capsys, "--fix", "tp=2", "--fix", "tp=4")
    assert status == 2
    assert "tp is fixed already" in err


def test_sequences_longer_than_the_model_are_remarked(capsys: pytest.CaptureFixture[str]) -> None:
    job = "plan --model llama-3-8b --gpu H200 --gpus 64 --global-batch 64 --seq-len 65536"
    _, out, _ = run(job, capsys)
    assert "sequences of 65,536 need another position" in out
