"""The after-training report: rates, TFLOPs and loss of a run, from its metrics.jsonl alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm_train.errors import UserError
from fastllm_train.metrics import SCHEMA
from fastllm_train.run_folder import RunFolder

# The first steps allocate, fill caches and build DeepSpeed's buffers: they are not the run's speed.
WARM_UP_STEPS = 5
RATES = (
    "tokens_per_s",
    "tokens_per_s_per_device",
    "model_tflops_full",
    "model_tflops_causal",
    "hardware_tflops",
    "mfu_full_pct",
)


EVENTS = ("rewind", "skip")


@dataclass(frozen=True)
class Metrics:
    """A metrics file: its restarts, and each step once (a step trained again after a restart counts
    as it was trained last). ``since_start`` numbers a step within its restart, from 0. ``ranks`` is
    the last record of all ranks' times; ``events`` are restarts, rewinds and updates left out."""

    runs: Sequence[dict[str, Any]]
    steps: Sequence[dict[str, Any]]
    since_start: Sequence[int]
    evaluations: Sequence[dict[str, Any]] = ()
    checkpoint_s: float = 0.0
    ranks: dict[str, Any] | None = None
    events: Sequence[dict[str, Any]] = ()


def read_metrics(path: Path) -> Metrics:
    """``UserError`` for a file that is no metrics file; a last line cut short is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}", hint="name a folder that run.out made"
        ) from error
    runs: list[dict[str, Any]] = []
    steps: dict[int, tuple[int, dict[str, Any]]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    since = 0
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            if number == len(lines) or _record(lines[number]) is not None:
                continue  # killed while it wrote
            raise UserError(f"{path}:{number} is not a metrics record")
        if record["kind"] == "run":
            if record.get("schema") != SCHEMA:
                raise UserError(f"{path}:{number} has schema {record.get('schema')!r}")
            runs.append(record)
            since = 0
            if len(runs) > 1:
                others.setdefault("event", []).append(record)
        elif record["kind"] == "step":
            steps[record["step"]] = (since, record)
            since += 1
        else:
            kind = "event" if record["kind"] in EVENTS else record["kind"]
            others.setdefault(kind, []).append(record)
    if not runs or not steps:
        raise UserError(f"{path} holds no finished step", hint="let the run go on for a few steps")
    ordered = [steps[step] for step in sorted(steps)]
    evaluations = {record["step"]: record for record in others.get("eval", [])}
    return Metrics(
        runs,
        [record for _, record in ordered],
        [since for since, _ in ordered],
        [evaluations[step] for step in sorted(evaluations)],
        sum(record.get("held_s", 0.0) for record in others.get("checkpoint", [])),
        others.get("ranks", [None])[-1],
        others.get("event", []),
    )


def report(metrics: Metrics, warm_up: int = WARM_UP_STEPS) -> dict[str, Any]:
    """JSON-ready. Rates are medians over the steps after the first ``warm_up`` of each (re)start
    (over all steps, when nothing would be left)."""
    timed = [
        s for s, since in zip(metrics.steps, metrics.since_start, strict=True) if since >= warm_up
    ]
    skipped = len(metrics.steps) - len(timed)
    if not timed:
        timed, skipped = list(metrics.steps), 0
    last_run = metrics.runs[-1]
    first, last = metrics.steps[0], metrics.steps[-1]
    return {
        "schema": 1,
        "params": last_run["params"],
        "device": last_run["device"],
        "devices": last_run["devices"],
        "dtype": last_run["dtype"],
        "parallel": last_run["parallel"],
        "batch": last_run["batch"],
        "peak_tflops": last_run["peak_tflops"],
        "peak_source": last_run["peak_source"],
        "restarts": len(metrics.runs) - 1,
        "steps": last["step"],
        "consumed_tokens": last["consumed_tokens"],
        "timed_steps": len(timed),
        "skipped_steps": skipped,
        "step_time_s": _median(timed, "step_time_s"),
        **{name: _median(timed, name) for name in RATES},
        "peak_mem_gib": max(step["peak_mem_gib"] for step in metrics.steps),
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        "loss_min": min(step["loss"] for step in metrics.steps),
        "validation_loss": metrics.evaluations[-1]["loss"] if metrics.evaluations else None,
        "updates_left_out": sum(not step.get("updated", True) for step in metrics.steps),
        "rewinds": sum(event["kind"] == "rewind" for event in metrics.events),
        "training_s": sum(step["step_time_s"] for step in metrics.steps),
        "evaluation_s": sum(record["seconds"] for record in metrics.evaluations),
        "checkpoint_s": metrics.checkpoint_s,
        "phase_share_pct": _phases(timed),
    }


def read_report(run: Path, warm_up: int = WARM_UP_STEPS) -> dict[str, Any]:
    """The report of a run's folder."""
    return report(read_metrics(RunFolder(run).metrics), warm_up)


def report_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The table: what, and its value."""
    peak = f"{values['peak_tflops']:.4g} TFLOP/s per device ({values['peak_source']})"
    devices = f"{values['devices']} × {values['device']}, {values['dtype']}"
    phases = ", ".join(f"{name} {share:.0f}%" for name, share in values["phase_share_pct"].items())
    steps = f"{values['steps']:,} ({values['restarts']} restarts, {values['rewinds']} rewinds, "
    rows = [
        ("model", f"{values['params']:,} parameters"),
        ("devices", devices),
        ("steps", f"{steps}{values['updates_left_out']} updates left out)"),
        ("tokens", f"{values['consumed_tokens']:,}"),
        ("tokens/s", f"{values['tokens_per_s']:,.0f}"),
        ("tokens/s per device", f"{values['tokens_per_s_per_device']:,.0f}"),
        ("step time", f"{values['step_time_s']:.3f} s"),
        ("model TFLOPs per device (full attention)", f"{values['model_tflops_full']:.4g}"),
        ("model TFLOPs per device (causal)", f"{values['model_tflops_causal']:.4g}"),
        ("hardware TFLOPs per device", f"{values['hardware_tflops']:.4g}"),
        ("MFU (model, full attention)", f"{values['mfu_full_pct']:.1f}% of {peak}"),
        ("peak memory per device", f"{values['peak_mem_gib']:.2f} GiB"),
        ("loss, first and last step", f"{values['loss_first']:.4f}, {values['loss_last']:.4f}"),
    ]
    if values["validation_loss"] is not None:
        rows.append(("validation loss, last", f"{values['validation_loss']:.4f}"))
    spent = (
        f"training {values['training_s']:,.0f} s, validation {values['evaluation_s']:,.0f} s, "
        f"held up by checkpoints {values['checkpoint_s']:,.0f} s"
    )
    return [*rows, ("time of a step", phases), ("time of the run", spent)]


def report_text(values: dict[str, Any]) -> str:
    """The table for a terminal."""
    rows = report_rows(values)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    note = f"rates: median of {values['timed_steps']} steps"
    if values["skipped_steps"]:
        note += f"; {values['skipped_steps']} warm-up steps are left out"
    return "\n".join([*lines, note])


def straggler_rows(metrics: Metrics, most: int = 8) -> list[list[str]]:
    """A head and the ``most`` slowest ranks of the last exchange; empty when there was none or one
    rank only. A rank's own work is data and forward: what it waits for others is in the rest."""
    if metrics.ranks is None:
        return []
    times: dict[str, list[float]] = metrics.ranks["phase_s"]
    own = [data + forward for data, forward in zip(times["data"], times["forward"], strict=True)]
    if len(own) < 2:
        return []
    middle = statistics.median(own) or 1e-9
    ordered = sorted(range(len(own)), key=lambda rank: -own[rank])[:most]
    head = ["rank", *times, "own work", "of the median"]
    return [head] + [
        [
            str(rank),
            *(f"{values[rank]:.4f}" for values in times.values()),
            f"{own[rank]:.4f}",
            f"{own[rank] / middle:.2f}",
        ]
        for rank in ordered
    ]


def straggler_text(metrics: Metrics) -> str:
    """The same for a terminal; "" when there is nothing to compare."""
    rows = straggler_rows(metrics)
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(["ranks, the slowest first (mean seconds of a step)", *lines])


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def _median(steps: Iterable[dict[str, Any]], name: str) -> float:
    return statistics.median(step[name] for step in steps)


def _phases(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Share of the steps' wall time by phase; "other" is what no phase claims."""
    wall = sum(step["step_time_s"] for step in steps)
    names = list(dict.fromkeys(name for step in steps for name in step["phase_s"]))
    shares = {n: 100 * sum(s["phase_s"].get(n, 0.0) for s in steps) / wall for n in names}
    return {**shares, "other": max(0.0, 100 - sum(shares.values()))}
