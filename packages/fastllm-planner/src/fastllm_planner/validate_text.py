"""The validation report as tables and as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean, median
from typing import Any

from tabulate import tabulate

from fastllm_planner.hardware import GIB
from fastllm_planner.validate import Errors, Report
from fastllm_planner.validate_rows import Skipped

SCHEMA = 1
# Rows that are listed by name before the rest is a number.
MOST_SKIPPED = 10


def report_text(report: Report, skipped: Sequence[Skipped]) -> str:
    """Tables of errors by series, verdicts and rankings, and which complete rows are missing."""
    parts = [_error_table("step time", report.time), _error_table("memory", report.memory)]
    parts += [_verdict_table(report), _group_table(report)]
    rows = len(report.predictions)
    inside = [p.inside_interval for p in report.predictions if p.inside_interval is not None]
    note = f"{rows} complete rows, each predicted by profiles fitted on other series only"
    if inside:
        note += (
            f"; {_percent(sum(inside) / len(inside))} % of the step times are inside the interval"
        )
    return "\n\n".join([part for part in parts if part] + [note + "\n" + _skipped_lines(skipped)])


def _skipped_lines(skipped: Sequence[Skipped]) -> str:
    """How many rows could not be read; of those called complete, which and why."""
    missing = [row for row in skipped if row.complete]
    lines = [f"not predicted: {row.id}: {row.reason}" for row in missing[:MOST_SKIPPED]]
    if len(missing) > MOST_SKIPPED:
        lines.append(f"not predicted: {len(missing) - MOST_SKIPPED} more (--json lists them)")
    others = len(skipped) - len(missing)
    if others:
        lines.append(f"{others} rows that the table does not call complete cannot be read (--json)")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _error_table(title: str, table: dict[str, Errors]) -> str:
    if not table:
        return ""
    rows = [
        [name, e.rows, *map(_percent, (e.mape, e.median, e.bias, e.within_10, e.within_20))]
        for name, e in table.items()
    ]
    headers = [title, "rows", "MAPE %", "median %", "bias %", "within 10 %", "within 20 %"]
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def _verdict_table(report: Report) -> str:
    rows = [
        [
            name,
            f"{v.oom_rejected} of {v.oom_rows}",
            f"{v.ran_rejected} of {v.ran_rows}",
            v.ran_forbidden,
        ]
        for name, v in report.verdicts.items()
        if v.oom_rows or v.ran_rejected or v.ran_forbidden or name == "all"
    ]
    headers = ["verdict", "failed runs rejected", "good runs rejected", "good runs against a rule"]
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def _group_table(report: Report) -> str:
    if not report.groups:
        return ""
    rows = [
        [g.series, g.model, g.gpus, g.layouts, f"{g.kendall_tau:.2f}", _percent(g.regret)]
        for g in report.groups
    ]
    taus = [g.kendall_tau for g in report.groups]
    regrets = [g.regret for g in report.groups]
    rows.append(["all", "mean", "", "", f"{mean(taus):.2f}", _percent(mean(regrets))])
    rows.append(["all", "median", "", "", f"{median(taus):.2f}", _percent(median(regrets))])
    headers = ["ranking", "model", "GPUs", "layouts", "Kendall tau", "regret %"]
    return tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)


def report_json(report: Report, skipped: Sequence[Skipped]) -> dict[str, Any]:
    """Everything the tables say, every row's prediction, and why rows were skipped."""
    rows: list[dict[str, Any]] = []
    for p in report.predictions:
        measured = p.row.memory_bytes
        rows.append(
            {
                "id": p.row.id,
                "series": p.row.series,
                "gpu": p.row.cluster.gpu.name,
                "backend": p.row.backend.name,
                "measured_s": p.row.seconds,
                "predicted_s": p.seconds,
                "low_s": p.low,
                "high_s": p.high,
                "measured_gib": None if measured is None else measured / GIB,
                "memory_kind": p.row.memory_kind,
                "predicted_gib": p.memory_bytes / GIB,
                "fits": p.fits,
                "breaks_rules": list(p.rules),
            }
        )
    taus = [g.kendall_tau for g in report.groups]
    regrets = [g.regret for g in report.groups]
    return {
        "schema": SCHEMA,
        "time": {name: asdict(e) for name, e in report.time.items()},
        "memory": {name: asdict(e) for name, e in report.memory.items()},
        "verdicts": {name: asdict(v) for name, v in report.verdicts.items()},
        "groups": [asdict(g) for g in report.groups],
        "kendall_tau_mean": mean(taus) if taus else None,
        "regret_median": median(regrets) if regrets else None,
        "rows": rows,
        "skipped": [asdict(row) for row in skipped],
    }
