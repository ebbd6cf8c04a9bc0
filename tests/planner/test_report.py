"""The HTML page: self-contained, every figure escaped and present, numbers those of the plan."""

from __future__ import annotations

import json
import re
import tomllib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastllm_planner.__main__ import main
from fastllm_planner.memory_parts import memory_parts
from fastllm_planner.report.charts import sequence_lengths
from fastllm_planner.report.page import answer, map_cells, render_page
from fastllm_planner.report.svg import ticks
from fastllm_planner.search import search
from fastllm_planner.trainer import TRAINER_SIZES

from .jobs import job

VOID = {"meta", "input", "br", "link", "img", "hr"}


class Checker(HTMLParser):
    """Collects ids and addresses, and holds every tag to its closing tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    return checker


@pytest.fixture(scope="module")
def page() -> str:
    question = job("llama-2-13b", "A100-80G", 32, "fastllm", global_batch=128, tokens=1e11)
    return render_page(answer(question, model="llama-2-13b", top_k=4))


def data_of(page: str) -> dict[str, Any]:
    raw = re.search(r'<script type="application/json" id="plan">(.*?)</script>', page, re.DOTALL)
    assert raw
    return json.loads(raw[1])


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    checker = checked(page)
    assert all(address.startswith("#") for address in checker.addresses)
    assert {address[1:] for address in checker.addresses} <= set(checker.ids)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_every_picture_is_there(page: str) -> None:
    data = data_of(page)
    assert len(data["plans"]) == 4
    assert page.count('<section class="plan"') == 4
    labels = re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)
    for name in ("pipeline stage by part", "sequence length", "Step time", "TP and PP"):
        assert any(name in label for label in labels), name
    assert any("schedule" in label for label in labels) or "without a bubble" in page
    assert data["verdict"] in unescape(page)
    assert "Assumptions and measured error" in page


def test_the_toml_is_what_emit_writes(page: str) -> None:
    plans = data_of(page)["plans"]
    blocks = re.findall(r'<pre id="toml-(\d+)" hidden>(.*?)</pre>', page, re.DOTALL)
    runs = [
        all(plan["layout"][axis] == size for axis, size in TRAINER_SIZES.items()) for plan in plans
    ]
    assert any(runs)
    # A layout that the trainer does not run has no TOML to copy.
    assert [int(rank) for rank, _ in blocks] == [i for i, ok in enumerate(runs, start=1) if ok]
    for rank, block in blocks:
        plan = plans[int(rank) - 1]
        config = tomllib.loads(unescape(block))
        for key in ("dp", "tp", "pp", "zero_stage", "recompute", "offload"):
            assert config["parallel"][key] == plan["layout"][key]


def test_bars_add_up_and_are_drawn_to_scale(page: str) -> None:
    plan = data_of(page)["plans"][0]
    section = page.split('<section class="plan"')[1]
    tips = re.findall(r"stage 0, ([a-z, ]+): ([\d.]+) GiB of ([\d.]+)", section)
    assert sum(float(value) for _, value, _ in tips) == pytest.approx(float(tips[0][2]), abs=0.05)
    assert float(tips[0][2]) == pytest.approx(plan["stages"][0]["required"] / 2**30, abs=0.01)
    heights = {
        kind: float(height)
        for height, kind in re.findall(
            r'height="([\d.]+)" class="m-(\w+)"><title>stage 0,', section
        )
    }
    weights, optimizer = plan["stages"][0]["weights"], plan["stages"][0]["optimizer"]
    assert heights["optimizer"] / heights["weights"] == pytest.approx(optimizer / weights, rel=0.02)


@pytest.mark.parametrize("stack", ["megatron-fused", "fsdp", "fastllm"])
def test_memory_parts_add_up(stack: str) -> None:
    question = job("llama-3-8b", "H100-SXM", 16, stack)
    for plan in answer(question, model="llama-3-8b").plans:
        for stage in plan.memory.stages:
            parts = memory_parts(stage)
            assert sum(parts.values()) == pytest.approx(stage.required)
            assert min(parts.values()) >= 0


def test_the_map_agrees_with_the_search() -> None:
    question = job("llama-2-13b", "A100-80G", 16, "megatron-fused")
    best = search(question, top_k=1000).ranked
    for cell in map_cells(question):
        same = [c for c in best if (c.layout.tp, c.layout.pp) == (cell.tp, cell.pp)]
        if cell.speed is None:
            assert same == []
        else:
            seconds = question.global_batch * question.seq_len / cell.speed / 16
            assert min(c.seconds for c in same) <= seconds * (1 + 1e-9)
            assert seconds <= min(c.seconds for c in same) * 1.02


def test_no_fit_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.html"
    command = "report --model llama-2-70b --gpu RTX-4090 --gpus 2 --global-batch 8 --out"
    assert main([*command.split(), str(out)]) == 1
    assert "does not fit" in capsys.readouterr().out
    html = out.read_text(encoding="utf-8")
    checked(html)
    assert "class=no" in html
    assert data_of(html)["fits"] is False


def test_odd_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastllm_planner.arch import preset, to_hf_config

    folder = tmp_path / "<script>alert(1)<"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(preset("gpt2"))), encoding="utf-8")
    out = tmp_path / "plan.html"
    command = ["report", "--model", str(folder / "config.json"), "--gpu", "A100", "--gpus", "2"]
    assert main([*command, "--global-batch", "8", "--seq-len", "1024", "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    checked(html)
    assert "<script>alert" not in html
    assert data_of(html)["job"]["model"] == "<script>alert(1)<"


def test_sequence_lengths_fit_the_layout() -> None:
    question = job("llama-2-13b", "A100-80G", 16, "megatron-fused", seq_len=6144)
    for plan in answer(question, model="llama-2-13b").plans:
        lengths = sequence_lengths(plan)
        assert 6144 in lengths
        assert lengths == sorted(lengths)
        assert all(n % (plan.layout.tp * plan.layout.cp) == 0 for n in lengths)


@pytest.mark.parametrize(
    ("top", "expected"),
    [(80, [0, 20, 40, 60, 80]), (0.9, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (5, [0, 1, 2, 3, 4, 5])],
)
def test_ticks(top: float, expected: list[float]) -> None:
    assert ticks(top) == pytest.approx(expected)
