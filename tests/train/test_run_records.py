"""What a run shows: event files, W&B, a profile, all ranks' times; its report and page; and the
planner's calibration from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from train_layouts import TINY

from fastllm_train.__main__ import main
from fastllm_train.line_chart import Series, line_chart, smoothed
from fastllm_train.report import read_metrics, straggler_rows
from fastllm_train.toml_text import to_toml

CONFIG = {
    "model": {"arch": TINY},
    "parallel": {"dp": 2, "zero_stage": 1},
    "batch": {"micro": 1, "global": 4, "seq_len": 32},
    "data": {"source": "synthetic"},
    "schedule": {"steps": 12},
    "eval": {"every": 4, "samples": 3},
    "logging": {"tensorboard": True, "wandb_project": "tiny", "ranks_every": 5},
    "profile": {"first_step": 3, "steps": 2, "ranks": [1]},
    "checkpoint": {"every": 0},
    "run": {"device": "cpu"},
}

# The calls of wandb's public interface that are used, written down as lines.
WANDB = """
import json
def init(*, project, name, dir, config, id, resume):
    assert (project, name, resume) == ("tiny", None, "allow"), (project, name, resume)
    assert config["parallel"]["dp"] == 2
    return Run(dir, id)
class Run:
    def __init__(self, folder, id):
        self.id = id or "first"
        self._file = open(f"{folder}/wandb-calls", "a")
    def log(self, values):
        self._file.write(json.dumps(values) + "\\n")
    def finish(self):
        self._file.write("finished\\n")
        self._file.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    root = tmp_path_factory.mktemp("records")
    (root / "config.toml").write_text(to_toml(CONFIG))
    (root / "wandb.py").write_text(WANDB)
    command = [sys.executable, "-m", "fastllm_train", "run", str(root / "config.toml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, f"run.out={root / 'out'}"], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| validation loss " in done.stderr
    return root / "out"


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.slow
def test_tensorboard_holds_the_curves(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"train/loss", "train/mfu_full_pct", "time/forward"} <= set(events.Tags()["scalars"])
    shown = [(e.step, e.value) for e in events.Scalars("train/loss")]
    steps = records(folder, "step")
    assert [step for step, _ in shown] == list(range(1, 13))
    assert [value for _, value in shown] == pytest.approx([s["loss"] for s in steps])
    assert [e.step for e in events.Scalars("validation/loss")] == [4, 8, 12]


@pytest.mark.slow
def test_weights_and_biases_gets_every_step(folder: Path) -> None:
    lines = (folder / "wandb-calls").read_text().splitlines()
    assert lines[-1] == "finished"
    logged = [json.loads(line) for line in lines[:-1]]
    assert [v["step"] for v in logged if "train/loss" in v] == list(range(1, 13))
    assert sum("validation/loss" in v for v in logged) == 3
    assert (folder / "wandb-run").read_text() == "first\n"


@pytest.mark.slow
def test_the_profile_holds_the_window_of_the_rank_asked_for(folder: Path) -> None:
    import gzip

    assert [file.name for file in (folder / "profile").iterdir()] == ["rank-00001.json.gz"]
    with gzip.open(folder / "profile/rank-00001.json.gz") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]
    assert sum("all_gather" in name for name in names) == 2  # of updated weights, a bucket a step


@pytest.mark.slow
def test_the_report_and_its_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--loss-svg", str(folder / "loss.svg")]) == 0
    shown = capsys.readouterr()
    assert "validation loss, last" in shown.out
    assert "ranks, the slowest first" in shown.out
    assert shown.err == f"wrote {folder / 'report.html'}, {folder / 'loss.svg'}\n"
    page = (folder / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert page.count("<svg ") == 6
    assert "http" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    for title in ("Loss, nats per token", "Tokens per second", "Peak memory per device, GiB"):
        assert title in page


@pytest.mark.slow
def test_the_planner_calibrates_from_it(folder: Path, tmp_path: Path) -> None:
    from fastllm_planner.__main__ import main as planner

    out = tmp_path / "here.json"
    metrics = str(folder / "metrics.jsonl")
    assert planner(["calibrate", metrics, "--gpu", "cpu", "--out", str(out)]) == 0
    assert json.loads(out.read_text())


class Balanced(HTMLParser):
    """Elements that were opened and not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        del attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Opened and closed at once."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_slow_rank_comes_first(tmp_path: Path) -> None:
    run = {"kind": "run", "schema": 1}
    step = {"kind": "step", "step": 1}
    seconds = {"data": [0.1, 0.1, 0.3], "forward": [1.0, 1.0, 1.5], "backward": [2.0, 2.0, 1.3]}
    ranks = {"kind": "ranks", "step": 1, "steps": 1, "phase_s": seconds}
    text = "\n".join(map(json.dumps, (run, step, ranks)))
    (tmp_path / "metrics.jsonl").write_text(text)
    head, first, *_ = straggler_rows(read_metrics(tmp_path / "metrics.jsonl"))
    assert head == ["rank", "data", "forward", "backward", "own work", "of the median"]
    assert first == ["2", "0.3000", "1.5000", "1.3000", "1.8000", "1.64"]


def test_a_chart_leaves_out_what_is_no_number_and_escapes_names() -> None:
    svg = line_chart(
        "a < b", "step", [Series("x", [1, 2, 3], [1.0, float("nan"), 3.0])], from_zero=True
    )
    assert "a &lt; b" in svg
    assert "nan" not in svg
    (line,) = [part for part in svg.splitlines() if part.startswith("<polyline")]
    assert line.count(",") == 2
    assert smoothed([4.0, 4.0, 4.0]) == pytest.approx([4.0, 4.0, 4.0])
