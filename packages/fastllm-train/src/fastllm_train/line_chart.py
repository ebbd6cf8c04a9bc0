"""A line chart as one SVG that stands alone, for pages and papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 48, 46
COLOURS = ("#3b6fb6", "#c45a5a", "#56a36c", "#8a6fb8")
INK, RULE = "#24292f", "#d9dfe7"
MOST_POINTS = 400  # of a line: one for two pixels


@dataclass(frozen=True)
class Series:
    """Points of one line, x rising. ``faint``: the raw values behind a smoothed line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    dots: bool = False


def line_chart(title: str, x_name: str, series: Sequence[Series], *, from_zero: bool) -> str:
    """The SVG. Values that are not finite are left out; ``from_zero``: the y axis starts at 0."""
    shown = [_finite(s) for s in series]
    xs = [x for s in shown for x in s.x] or [0.0]
    ys = [y for s in shown for y in s.y] or [0.0]
    y_ticks = _ticks(0.0 if from_zero else min(ys), max(ys))
    x_ticks = _ticks(min(xs), max(xs))
    low, high = y_ticks[0], y_ticks[-1]
    first, last = min(xs), max(max(xs), min(xs) + 1e-9)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in y_ticks:
        _, y = place(first, tick)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{RULE}"/>'
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in x_ticks:
        if first <= tick <= last:
            x, _ = place(tick, low)
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                f"{_short(tick)}</text>"
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>'
    )
    at = LEFT
    for number, s in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        parts += _line(s, colour, [place(x, y) for x, y in zip(s.x, s.y, strict=True)])
        parts.append(
            f'<rect x="{at}" y="29" width="14" height="4" fill="{colour}" '
            f'opacity="{0.35 if s.faint else 1}"/>'
            f'<text x="{at + 19}" y="35">{escape(s.name)}</text>'
        )
        at += 40 + 7 * len(s.name)
    return "\n".join([*parts, "</svg>"]) + "\n"


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential mean that does not lean towards its first value (as Adam's moments are)."""
    found: list[float] = []
    total = share = 0.0
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            share = weight * share + 1 - weight
        found.append(total / share if share else value)
    return found


def _line(s: Series, colour: str, points: Sequence[tuple[float, float]]) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    look = 'stroke-width="1" opacity="0.35"' if s.faint else 'stroke-width="2"'
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" {look}/>']
    if s.dots:
        for (x, y), at, value in zip(points, s.x, s.y, strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
                f"<title>{_short(at)}: {value:.4g}</title></circle>"
            )
    return parts


def _finite(s: Series) -> Series:
    step = max(1, len(s.x) // MOST_POINTS)
    both = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
    kept = both[::step]
    if both and kept[-1] != both[-1]:
        kept.append(both[-1])
    return Series(s.name, [x for x, _ in kept], [y for _, y in kept], s.faint, s.dots)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values that enclose both, in steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _short(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.3g}"
