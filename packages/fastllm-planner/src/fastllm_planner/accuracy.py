"""How far predictions were from published runs, as data (``accuracy.toml``)."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Accuracy:
    """Errors over ``rows`` runs of ``series`` ("all": of every series), in per cent."""

    series: str
    rows: int
    median_pct: float
    within_20_pct: float


@cache
def shipped_accuracy() -> dict[str, tuple[Accuracy, ...]]:
    """``time`` and ``memory``: one entry per series, and the one over all."""
    text = files("fastllm_planner").joinpath("accuracy.toml").read_text(encoding="utf-8")
    raw = tomllib.loads(text)
    return {kind: tuple(Accuracy(**row) for row in raw[kind]) for kind in ("time", "memory")}


def accuracy_sentence() -> str:
    """The two totals in words."""
    totals = {
        kind: next(row for row in rows if row.series == "all")
        for kind, rows in shipped_accuracy().items()
    }
    time, memory = totals["time"], totals["memory"]
    return (
        f"Of {time.rows} published runs, each predicted by what other series say, the step time is "
        f"{time.median_pct:g}% off (median; {time.within_20_pct:.0f}% of them within 20%); memory, "
        f"known of {memory.rows}, is {memory.median_pct:g}% off."
    )
