"""The after-training report as one HTML file: the table, the curves, the ranks. Nothing is loaded
from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from fastllm_train.line_chart import Series, line_chart, smoothed
from fastllm_train.report import Metrics, report_rows, straggler_rows

_STYLE = """
body { margin: 0 auto; padding: 1.2rem; max-width: 860px; color: #1c2430; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 1.6rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #d9dfe7; text-align: left; }
.ranks td, .ranks th { text-align: right; }
svg { width: 100%; height: auto; display: block; margin: 0.8rem 0; }
.note { color: #5a6675; font-size: 0.88rem; }
@media (max-width: 600px) { .wide { overflow-x: auto; } }
"""


def report_page(name: str, metrics: Metrics, values: dict[str, Any]) -> str:
    """The page of run ``name``; ``values`` is ``report.report``'s."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Training run {escape(name)}</h1>",
        _table("", [("", "")], report_rows(values)),
        f'<p class="note">Rates are medians of {values["timed_steps"]} steps; '
        f"{values['skipped_steps']} warm-up steps are left out.</p>",
        *charts(metrics),
    ]
    rows = straggler_rows(metrics)
    if rows:
        parts.append("<h2>Ranks, the slowest first (mean seconds of a step)</h2>")
        parts.append(_table("ranks", rows[:1], rows[1:]))
        parts.append(
            '<p class="note">Own work is reading data and the forward pass; a rank that others '
            "wait for shows there, the waiting ones in backward and optimizer.</p>"
        )
    events = list(_events(metrics))
    if events:
        parts.append("<h2>What happened</h2>")
        parts.append(_table("", [("step", "what")], events))
    return "\n".join([*parts, "</body></html>"]) + "\n"


def charts(metrics: Metrics) -> list[str]:
    """Loss, throughput, memory, gradient norm and rate, each an SVG of its own."""
    return [
        loss_chart(metrics),
        _over_steps(metrics, "Tokens per second", ["tokens_per_s"]),
        _over_steps(metrics, "Model TFLOPs per device (full attention)", ["model_tflops_full"]),
        _over_steps(metrics, "Peak memory per device, GiB", ["peak_mem_gib"]),
        _over_steps(metrics, "Gradient norm before clipping", ["grad_norm"]),
        _over_steps(metrics, "Learning rate", ["lr"]),
    ]


def loss_chart(metrics: Metrics) -> str:
    """Training loss by step, raw and smoothed, and the validation loss."""
    steps, losses = _column(metrics, "step"), _column(metrics, "loss")
    series = [
        Series("training, each step", steps, losses, faint=True),
        Series("training, smoothed", steps, smoothed(losses)),
    ]
    if metrics.evaluations:
        series.append(
            Series(
                "validation",
                [float(e["step"]) for e in metrics.evaluations],
                [float(e["loss"]) for e in metrics.evaluations],
                dots=True,
            )
        )
    return line_chart("Loss, nats per token", "step", series, from_zero=False)


def _over_steps(metrics: Metrics, title: str, keys: Sequence[str]) -> str:
    steps = _column(metrics, "step")
    series = [Series(key, steps, _column(metrics, key)) for key in keys]
    return line_chart(title, "step", series, from_zero=True)


def _column(metrics: Metrics, key: str) -> list[float]:
    return [float(step[key]) for step in metrics.steps]


def _events(metrics: Metrics) -> Iterator[tuple[str, str]]:
    for event in metrics.events:
        step = str(event.get("step", event.get("resumed_from")))
        if event["kind"] == "run":
            yield step, "the run was started again"
        elif event["kind"] == "rewind":
            yield step, f"{event['reason']}: back to step {event['to_step']}"
        else:
            yield step, f"{event['reason']}: the update was left out"


def _table(kind: str, head: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> str:
    lines = [f'<div class="wide"><table class="{kind}">']
    for row in head:
        if any(row):
            cells = "".join(f"<th>{escape(cell)}</th>" for cell in row)
            lines.append(f"<tr>{cells}</tr>")
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table></div>"])
