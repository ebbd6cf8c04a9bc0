"""Every config under configs/ passes `check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastllm_train.__main__ import main

CONFIGS = Path(__file__).parents[2] / "configs"
PLAN = """
[model]
preset = "llama-10m"
[parallel]
dp = 2
[batch]
micro = 2
global = 4
seq_len = 256
"""


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_check_accepts(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base: list[str] = []
    if path.stem == "quickstart":  # its base is what the planner emits
        (tmp_path / "plan.toml").write_text(PLAN)
        base = [f"base={tmp_path / 'plan.toml'}"]
    status = main(["check", str(path), *base, "--json"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    preset = json.loads(shown.out)["config"]["model"]["preset"]
    assert preset in (path.stem, path.stem.removesuffix("-chat"), "llama-10m")
