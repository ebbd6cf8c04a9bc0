"""``fastllm-convert verify``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fastllm_convert.commands.options import (
    emit,
    json_option,
    path_argument,
    read_options,
    say,
    source_options,
)


@click.command()
@path_argument("first")
@path_argument("second")
@source_options
@click.option("--tolerance", type=float, help="Largest absolute difference allowed [bit-exact].")
@click.option("--logits", is_flag=True, help="Also run both models (needs torch, transformers).")
@json_option
@click.pass_context
def verify(
    context: click.Context,
    first: Path,
    second: Path,
    tolerance: float | None,
    logits: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Compare two checkpoints, of any formats, tensor by tensor. Exit 0: equal, 1: not.

    \b
    Example:
      fastllm-convert verify runs/my/checkpoints my-model-hf
      fastllm-convert verify a b --tolerance 1e-6 --logits

    Without --tolerance every bit must agree, types included. --from is FIRST's format.
    """
    del context
    from fastllm_convert.comparison import compare
    from fastllm_convert.conversion import read_source

    options = read_options(given)
    a = read_source(first, options)
    b = read_source(second, replace(options, format=None))
    say(f"first: {a.summary}")
    say(f"second: {b.summary}")
    found = compare(a, b, tolerance)
    result: dict[str, Any] = {
        "equal": found.equal,
        "tensors": found.tensors,
        "largest_difference": found.largest,
        "differences": found.differences,
        "architecture": found.architecture,
    }
    lines = [*found.architecture, *found.differences]
    equal = found.equal
    if logits:
        from fastllm_convert.logits import largest_logit_difference

        gap = largest_logit_difference(a, b)
        result["largest_logit_difference"] = gap
        allowed = 0.0 if tolerance is None else tolerance
        equal = result["equal"] = equal and gap <= allowed
        lines.append(f"logits differ by at most {gap:.3g}")
    verdict = "equal" if equal else "different"
    how = "bit for bit" if tolerance is None else f"within {tolerance:g}"
    lines.append(f"{verdict}: {found.tensors} tensors compared {how}")
    emit(result, as_json, "\n".join(lines))
    sys.stdout.flush()
    return 0 if equal else 1
