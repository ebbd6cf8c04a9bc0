"""Small pieces of inline SVG: escaped text, boxes with tooltips, axes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

FONT = 12


def number(value: float) -> str:
    """A coordinate: two decimals are less than a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def text(
    x: float, y: float, content: str, *, anchor: str = "start", kind: str = "", size: int = FONT
) -> str:
    classes = f' class="{kind}"' if kind else ""
    return (
        f'<text x="{number(x)}" y="{number(y)}" text-anchor="{anchor}" '
        f'font-size="{size}"{classes}>{escape(content)}</text>'
    )


def box(
    x: float,
    y: float,
    width: float,
    height: float,
    kind: str,
    tip: str = "",
    *,
    focus: bool = False,
) -> str:
    """A rectangle; ``tip`` shows on hover and is read out on focus."""
    reach = f' tabindex="0" role="img" aria-label="{escape(tip)}"' if focus and tip else ""
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<rect x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}" '
        f'height="{number(max(height, 0))}" class="{kind}"{reach}>{title}</rect>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return (
        f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" '
        f'class="{kind}"/>'
    )


def polygon(points: Iterable[tuple[float, float]], kind: str, tip: str = "") -> str:
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return f'<polygon points="{path}" class="{kind}">{title}</polygon>'


def figure(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """The ``<svg>``: scales to its container, named for screen readers."""
    body = "\n".join(parts)
    least = number(min(width, 560))  # below that, labels are unreadable: the container scrolls
    return (
        f'<svg viewBox="0 0 {number(width)} {number(height)}" role="group" '
        f'aria-label="{escape(label)}" style="min-width:{least}px">\n{body}\n</svg>'
    )


def ticks(top: float, wanted: int = 5) -> list[float]:
    """Round values from 0 to at least ``top`` in steps of 1, 2 or 5 times a power of ten."""
    if top <= 0:
        return [0.0, 1.0]
    raw = top / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def legend(x: float, y: float, entries: Iterable[tuple[str, str]], width: float) -> list[str]:
    """Colour keys in a row, wrapping at ``width``."""
    parts: list[str] = []
    at, row = x, y
    for kind, label in entries:
        needed = 26 + 6.6 * len(label)
        if at + needed > width:
            at, row = x, row + 18
        parts += [box(at, row - 10, 12, 12, kind), text(at + 17, row, label)]
        at += needed
    return parts
