"""The validation report as tables and as one JSON object."""

from __future__ import annotations

from dataclasses import asdict
from statistics import mean, median
from typing import Any

from tabulate import tabulate

from fastllm_planner.hardware import GIB
from fastllm_planner.validate import Errors, Report

SCHEMA = 1


def report_text(report: Report, skipped: int) -> str:
    """Tables of errors by series, verdicts and rankings."""
    parts = [_error_table("step time", report.time), _error_table("memory", report.memory)]
    parts += [_verdict_table(report), _group_table(report)]
    rows = len(report.predictions)
    note = f"{rows} complete rows, each predicted by profiles fitted on other series only"
    if skipped:
        note += (
            f"; {skipped} rows cannot be read as a dense run with known layout (--json lists why)"
        )
    return "\n\n".join([part for part in parts if part] + [note])


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
        [name, f"{v.oom_rejected} of {v.oom_rows}", f"{v.ran_rejected} of {v.ran_rows}"]
        for name, v in report.verdicts.items()
        if v.oom_rows or v.ran_rejected or name == "all"
    ]
    headers = ["out of memory", "failed runs rejected", "good runs rejected"]
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


def report_json(report: Report, skipped: list[tuple[str, str]]) -> dict[str, Any]:
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
                "measured_gib": None if measured is None else measured / GIB,
                "memory_kind": p.row.memory_kind,
                "predicted_gib": p.memory_bytes / GIB,
                "fits": p.fits,
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
        "skipped": [{"id": name, "reason": reason} for name, reason in skipped],
    }
