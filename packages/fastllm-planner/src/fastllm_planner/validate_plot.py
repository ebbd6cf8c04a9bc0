"""Scatter of predicted against measured, as one SVG file without dependencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from fastllm_planner.hardware import GIB
from fastllm_planner.validate import Report

# Okabe-Ito palette: tells apart for every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
SIZE, MARGIN = 380.0, 56.0

Point = tuple[str, float, float]


def scatter_svg(report: Report) -> str:
    """Two panels, step time (seconds) and memory (GiB), with the diagonal and the ±20 % band."""
    times = [(p.row.series, p.row.seconds, p.seconds) for p in report.predictions if p.row.seconds]
    memory = [
        (p.row.series, p.row.memory_bytes / GIB, p.memory_bytes / GIB)
        for p in report.predictions
        if p.row.memory_bytes
    ]
    names = list(dict.fromkeys(p.row.series for p in report.predictions))
    panels = [
        _panel(title, points, names, left)
        for title, points, left in (
            ("step time, s", times, 0.0),
            ("memory, GiB", memory, SIZE + MARGIN),
        )
        if points
    ]
    width = MARGIN + len(panels) * (SIZE + MARGIN)
    height = SIZE + 2 * MARGIN + 18 * math.ceil(len(names) / 4)
    body = "\n".join([*panels, _legend(names)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _mark(names: Sequence[str], series: str, x: float, y: float, radius: float) -> str:
    """A series' mark: circles in eight colours, then squares in the same ones."""
    index = names.index(series)
    fill = f'fill="{COLOURS[index % len(COLOURS)]}" fill-opacity="0.6"'
    if index < len(COLOURS):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {fill}/>'
    left, top = x - radius, y - radius
    side = f'width="{2 * radius}" height="{2 * radius}"'
    return f'<rect x="{left:.1f}" y="{top:.1f}" {side} {fill}/>'


def _panel(title: str, points: Sequence[Point], names: Sequence[str], left: float) -> str:
    values = [value for _, measured, predicted in points for value in (measured, predicted)]
    low, high = math.log10(min(values) * 0.8), math.log10(max(values) * 1.25)

    def at(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * SIZE

    x0, y0 = left + MARGIN, MARGIN + SIZE
    parts = [
        f'<rect x="{x0}" y="{MARGIN}" width="{SIZE}" height="{SIZE}" fill="none" stroke="#999"/>',
        f'<text x="{x0 + SIZE / 2}" y="{MARGIN - 14}" text-anchor="middle">{escape(title)}: '
        "predicted (up) against measured (right)</text>",
    ]
    for factor, dash in ((1.0, ""), (1.2, "4 4"), (1 / 1.2, "4 4")):
        shift = math.log10(factor) / (high - low) * SIZE
        start, end = max(0.0, -shift), min(SIZE, SIZE - shift)
        parts.append(
            f'<line x1="{x0 + start:.1f}" y1="{y0 - start - shift:.1f}" x2="{x0 + end:.1f}" '
            f'y2="{y0 - end - shift:.1f}" stroke="#999" stroke-dasharray="{dash}"/>'
        )
    for exponent in range(math.ceil(low), math.floor(high) + 1):
        where = at(10.0**exponent)
        label = f"{10.0**exponent:g}"
        parts.append(
            f'<text x="{x0 + where:.1f}" y="{y0 + 16}" text-anchor="middle">{label}</text>'
        )
        parts.append(
            f'<text x="{x0 - 6}" y="{y0 - where + 4:.1f}" text-anchor="end">{label}</text>'
        )
    for series, measured, predicted in points:
        parts.append(_mark(names, series, x0 + at(measured), y0 - at(predicted), 3))
    return "\n".join(parts)


def _legend(names: Sequence[str]) -> str:
    parts: list[str] = []
    for i, name in enumerate(names):
        x, y = MARGIN + 170 * (i % 4), MARGIN + SIZE + 40 + 18 * (i // 4)
        parts.append(_mark(names, name, x, y - 4, 5))
        parts.append(f'<text x="{x + 10}" y="{y}">{escape(name)}</text>')
    return "\n".join(parts)
