"""Layouts of real models whose traced peak the planner must foresee within BOUND.

    python tests/train/memory_layouts.py     trace them all (some minutes), print the table

exits 1 if one is further off. The test traces the first few of them.
"""

from __future__ import annotations

import sys
from typing import Any

from fastllm_planner.hardware import GIB
from fastllm_train.config import Config, build_config
from fastllm_train.trace.report import memory_report

BOUND = 0.05
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
SP = {"sequence_parallel": True}
# (preset, parallel, sequences of a micro-batch); one per line
LAYOUTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "7B tp4 dp8": ("llama-2-7b", {"tp": 4, "dp": 8, **SP}, 1),
    "7B pp2 tp2 dp8, full": ("llama-2-7b", {"pp": 2, "tp": 2, "dp": 8, **FULL}, 1),
    "7B tp4 dp8 zero2, full": ("llama-2-7b", {"tp": 4, "dp": 8, "zero_stage": 2, **SP, **FULL}, 1),
    "7B tp4 dp8, selective": ("llama-2-7b", {"tp": 4, "dp": 8, **SP, **SELECTIVE}, 1),
    "7B tp4 dp8, full": ("llama-2-7b", {"tp": 4, "dp": 8, **SP, **FULL}, 1),
    "7B tp4 dp8 zero0, full": ("llama-2-7b", {"tp": 4, "dp": 8, "zero_stage": 0, **SP, **FULL}, 1),
    "7B tp4 dp8 zero2": ("llama-2-7b", {"tp": 4, "dp": 8, "zero_stage": 2, **SP}, 1),
    "7B tp4 dp8, micro 2": ("llama-2-7b", {"tp": 4, "dp": 8, **SP}, 2),
    "7B tp4 dp64, no accumulation": ("llama-2-7b", {"tp": 4, "dp": 64, **SP, **FULL}, 1),
    "7B tp8 dp4, no sp": ("llama-2-7b", {"tp": 8, "dp": 4}, 1),
    "7B dp8, full": ("llama-2-7b", {"dp": 8, **FULL}, 1),
    "7B dp8 zero2": ("llama-2-7b", {"dp": 8, "zero_stage": 2}, 1),
    "7B pp2 tp2 dp8": ("llama-2-7b", {"pp": 2, "tp": 2, "dp": 8}, 1),
    "7B pp4 tp2 dp4": ("llama-2-7b", {"pp": 4, "tp": 2, "dp": 4, **SP}, 1),
    "7B pp4 dp8 zero0, selective": (
        "llama-2-7b",
        {"pp": 4, "dp": 8, "zero_stage": 0, **SELECTIVE},
        1,
    ),
    "7B cp2 tp2 dp8 zero2": ("llama-2-7b", {"cp": 2, "tp": 2, "dp": 8, "zero_stage": 2, **SP}, 1),
    "13B tp4 pp2 dp4, full": ("llama-2-13b", {"tp": 4, "pp": 2, "dp": 4, **SP, **FULL}, 1),
    "70B tp8 pp4 dp8": ("llama-2-70b", {"tp": 8, "pp": 4, "dp": 8, **SP}, 1),
    "70B tp8 pp4 dp8, full": ("llama-2-70b", {"tp": 8, "pp": 4, "dp": 8, **SP, **FULL}, 1),
}


def config_of(name: str) -> Config:
    preset, parallel, micro = LAYOUTS[name]
    return build_config(
        {
            "model": {"preset": preset},
            "parallel": {"zero_stage": 1, **parallel},
            "batch": {"micro": micro, "global": 64, "seq_len": 4096},
            "data": {"source": "synthetic"},
            "precision": {"dtype": "bf16"},
        }
    )


def stages_of(name: str) -> list[dict[str, Any]]:
    """Every traced stage's row of ``memory_report``; ``off``: the planner's, relative to it."""
    config = config_of(name)
    rows = memory_report(config, config.model.resolve(), None)["stages"]
    return [{**row, "off": row["planner_bytes"] / row["peak_bytes"] - 1.0} for row in rows]


def main() -> int:
    worst = 0.0
    print(f"{'layout':<30}{'stage':>6}{'traced GiB':>12}{'planner GiB':>13}{'off':>8}  peak in")
    for name in LAYOUTS:
        for row in stages_of(name):
            traced, planned = row["peak_bytes"] / GIB, row["planner_bytes"] / GIB
            print(
                f"{name:<30}{row['stage']:>6}{traced:>12.2f}{planned:>13.2f}{row['off']:>+8.1%}"
                f"  {row['peak_in']}",
                flush=True,
            )
            worst = max(worst, abs(row["off"]))
    print(f"worst {worst:.1%} of {len(LAYOUTS)} layouts, bound {BOUND:.0%}")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
