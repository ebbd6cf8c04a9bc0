"""Plain tables: columns two spaces apart, numbers to the right, a rule under the headers.

tabulate pads every header and costs 50 ms to import; it is kept for the classic calculator, whose
tables people compare character by character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def columns(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    drop: Mapping[str, str] | None = None,
) -> str:
    """The table as text. The first ``left`` columns are left-aligned.

    ``drop``: header → value; a column that holds nothing but that value is left out.
    """
    empty = drop or {}
    kept = [
        i
        for i, header in enumerate(headers)
        if header not in empty or any(row[i] != empty[header] for row in rows)
    ]
    widths = {i: max(len(headers[i]), *(len(row[i]) for row in rows), 1) for i in kept}

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[i].ljust(widths[i]) if i < left else cells[i].rjust(widths[i]) for i in kept
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * widths[i] for i in kept)
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])
