"""A histogram of document lengths as an SVG, for pages and papers."""

from __future__ import annotations

from html import escape

from fastllm_data.statistics import Statistics

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 80, 20, 56, 64
BAR, AXIS, INK = "#3b76c4", "#8a8f98", "#24292f"


def histogram_svg(stats: Statistics) -> str:
    """Bars of documents over their length in tokens, by powers of two."""
    bins = stats.histogram
    most = max((count for _, _, count in bins), default=1)
    step = (WIDTH - LEFT - RIGHT) / max(1, len(bins))
    high = HEIGHT - TOP - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12" fill="{INK}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 22, f"{stats.prefix}: tokens a document", size=15),
        _text(
            LEFT,
            40,
            f"{stats.documents:,} documents, {stats.tokens:,} tokens; median "
            f"{stats.median_length:,.0f}, mean {stats.mean_length:,.0f}, max {stats.max_length:,}",
        ),
    ]
    for quarter in range(5):
        y = TOP + high - high * quarter / 4
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{AXIS}" stroke-width="{1 if quarter == 0 else 0.3}"/>'
        )
        parts.append(_text(LEFT - 8, y + 4, _short(most * quarter / 4), anchor="end"))
    for number, (low, top, count) in enumerate(bins):
        x, tall = LEFT + number * step, high * count / most
        said = f"{low:,} to {top:,} tokens: {count:,} documents"
        parts.append(
            f'<rect x="{x + step * 0.08:.1f}" y="{TOP + high - tall:.1f}" '
            f'width="{step * 0.84:.1f}" height="{tall:.1f}" fill="{BAR}">'
            f"<title>{said}</title></rect>"
        )
        parts.append(_text(x + step / 2, TOP + high + 16, _short(low), anchor="middle"))
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(
        _text(middle, HEIGHT - 16, "tokens, from (each bar up to the next)", anchor="middle")
    )
    parts.append("</svg>\n")
    return "\n".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(text)}</text>"
    )


def _short(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"
