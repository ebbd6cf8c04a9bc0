"""``calibrate``: a profile from metrics, and what ``plan --profile`` then predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastllm_planner.__main__ import main
from fastllm_planner.arch import preset, spec_to_dict
from fastllm_planner.backends import backend
from fastllm_planner.calibrate import WARM_UP_STEPS, calibrate, read_segments
from fastllm_planner.efficiency import default_profile
from fastllm_planner.hardware import Cluster, gpu
from fastllm_planner.layout import Layout
from fastllm_planner.steptime import step_seconds

PARALLEL = {"dp": 8, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "zero_stage": 1, "recompute": "none"}
BATCH = {"micro": 1, "global": 64, "seq_len": 2048}


def run_line(**changes: Any) -> dict[str, Any]:
    arch = spec_to_dict(preset("llama-3.2-1b"))
    head = {"kind": "run", "schema": 1, "device": "cuda", "devices": 8, "dtype": "bf16"}
    return {**head, "arch": arch, "parallel": PARALLEL, "batch": BATCH, **changes}


def write_metrics(path: Path, *segments: tuple[dict[str, Any], list[float]]) -> Path:
    lines: list[str] = []
    for run, seconds in segments:
        lines.append(json.dumps(run))
        lines += [
            json.dumps({"kind": "step", "step": i, "step_time_s": s})
            for i, s in enumerate(seconds, start=1)
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def predicted(profile: Any = None) -> float:
    layout = Layout(dp=8, global_batch=64, seq_len=2048)
    cluster = Cluster(gpu("A100-80G"), 8, 8)
    return step_seconds(preset("llama-3.2-1b"), layout, cluster, backend("fastllm"), profile)


def test_a_slower_cluster_is_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = 1.4 * predicted()
    steps = [9.0] * WARM_UP_STEPS + [measured * f for f in (0.98, 1.0, 1.0, 1.02, 5.0)]
    file = write_metrics(tmp_path / "metrics.jsonl", (run_line(), steps))
    out = tmp_path / "profile.json"
    assert main(["calibrate", str(file), "--gpu", "A100-80G", "--out", str(out)]) == 0
    assert "A100-80G, fastllm: compute takes" in capsys.readouterr().out
    plan = "estimate --model llama-3.2-1b --gpu A100-80G --gpus 8 --global-batch 64".split()
    plan += ["--seq-len", "2048", "--json"]
    assert main([*plan, "--profile", str(out)]) == 0
    after = json.loads(capsys.readouterr().out)["plan"]["step_seconds"]
    # The prior pulls back a little: one measurement is not the whole truth.
    assert after["total"] == pytest.approx(measured, rel=0.10)
    assert after["total"] > 1.2 * predicted()
    assert after["high"] / after["total"] >= 1.10


def test_a_segment_is_the_median_after_the_warm_up(tmp_path: Path) -> None:
    file = write_metrics(
        tmp_path / "m.jsonl",
        (run_line(), [100.0, 100.0, 100.0, 1.0, 2.0, 30.0]),
        (run_line(), [100.0, 100.0, 100.0]),  # nothing left: no measurement
        (run_line(batch={**BATCH, "micro": 2}), [100.0] * WARM_UP_STEPS + [7.0]),
    )
    segments = read_segments(file)
    assert [s.median for s in segments] == [2.0, 7.0]
    assert [s.layout.micro_batch for s in segments] == [1, 2]
    assert segments[0].layout.dp == 8
    assert segments[0].spec == preset("llama-3.2-1b")


def test_a_perfect_prediction_changes_nothing(tmp_path: Path) -> None:
    steps = [predicted()] * (WARM_UP_STEPS + 5)
    segments = read_segments(write_metrics(tmp_path / "m.jsonl", (run_line(), steps)))
    profile = calibrate(segments, "A100-80G", 8, backend("fastllm")).profile
    start = default_profile("A100-80G", "fastllm")
    assert profile.compute == pytest.approx(start.compute, rel=0.01)
    assert profile.communication == pytest.approx(start.communication, rel=0.01)


def test_cpu_runs_need_no_gpu_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_line(device="cpu", dtype="fp32", parallel={**PARALLEL, "dp": 2})
    run["batch"] = {"micro": 1, "global": 4, "seq_len": 256}
    file = write_metrics(tmp_path / "m.jsonl", (run, [3.0] * 6))
    assert main(["calibrate", str(file), "--json"]) == 0
    profile = json.loads(capsys.readouterr().out)["profile"]
    assert profile["gpu"].startswith("cpu")
    assert profile["measurements"] == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], ":1 is not JSON"),
        (["[]"], ":1 is not a JSON object"),
        (['{"kind": "step", "step_time_s": 1}'], ":1: a step before any run line"),
        ([json.dumps(run_line()), '{"kind": "step", "step_time_s": -1}'], ":2: step_time_s=-1"),
        ([json.dumps(run_line()), '{"kind": "step", "step_time_s": NaN}'], ":2: step_time_s=nan"),
        ([json.dumps(run_line(schema=7))], "schema 7 is unknown"),
        ([json.dumps(run_line(arch=None))], "no arch"),
        ([json.dumps(run_line(arch={"family": "llama"}))], ":1"),
        ([json.dumps(run_line(parallel={"dp": "8"}))], "dp='8'"),
        ([json.dumps(run_line(parallel={"recompute": "some"}))], "recompute"),
        ([json.dumps(run_line())], "nothing to fit"),
        (["[" * 100_000], ":1 is not JSON"),
    ],
)
def test_broken_metrics_name_the_line(
    lines: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "profile.json"
    assert main(["calibrate", str(file), "--gpu", "A100-80G", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert not out.exists()


def test_gpu_runs_must_say_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_metrics(tmp_path / "m.jsonl", (run_line(), [1.0] * 6))
    assert main(["calibrate", str(file)]) == 2
    assert "--gpu NAME" in capsys.readouterr().err


def test_a_cut_last_line_is_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_metrics(tmp_path / "m.jsonl", (run_line(), [1.0] * 6))
    whole = read_segments(file)
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"kind": "step", "step_ti')
    notes: list[str] = []
    assert read_segments(file, notes.append) == whole
    assert len(notes) == 1
    assert ":8: the last line is cut" in notes[0]
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n")  # finished, so damaged
    assert main(["calibrate", str(file), "--gpu", "A100-80G"]) == 2
    assert ":8 is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "name", "message"),
    [("cpu", "H100-SXM", "was on the CPU"), ("cuda", "cpu", "was on a GPU")],
)
def test_the_gpu_must_be_what_the_run_used(
    device: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_metrics(tmp_path / "m.jsonl", (run_line(device=device), [1.0] * 6))
    assert main(["calibrate", str(file), "--gpu", name]) == 2
    assert message in capsys.readouterr().err


def test_a_profile_of_another_gpu_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_metrics(tmp_path / "m.jsonl", (run_line(), [1.0] * 6))
    out = tmp_path / "profile.json"
    assert main(["calibrate", str(file), "--gpu", "A100-80G", "--out", str(out)]) == 0
    capsys.readouterr()
    plan = "estimate --model llama-3.2-1b --gpu H100-SXM --gpus 8 --profile".split()
    assert main([*plan, str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "is of A100-80G with fastllm, the plan is for H100-SXM" in captured.err
