"""``plan``: the fastest strategies that fit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastllm_planner.cli.job_options import build_job, job_options
from fastllm_planner.cli.options import WHOLE, verb
from fastllm_planner.errors import UserError

EXAMPLE = "fastllm-planner plan --model llama-3-8b --gpu H100-SXM --gpus 64 --tokens 1T"


@verb("plan", EXAMPLE)
@job_options
@click.option("--top-k", type=WHOLE, default=5, show_default=True, help="Strategies to list.")
@click.option(
    "--fix", multiple=True, metavar="AXIS=VALUE", help="Search only there: tp=4 (repeatable)."
)
@click.option("--explain", is_flag=True, help="Why each other layout was rejected.")
@click.option(
    "--emit",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write train.toml, deepspeed.json, slurm.sh or torchrun.sh (repeatable).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    top_k: int,
    fix: tuple[str, ...],
    explain: bool,
    emit: tuple[Path, ...],
    as_json: bool,
    **options: Any,
) -> int:
    """Find the fastest strategy that fits."""
    from fastllm_planner.emit import check_job, check_targets, emit_plan, trains
    from fastllm_planner.plan import price_layout
    from fastllm_planner.plan_text import (
        render_alternatives,
        render_assumptions,
        render_no_fit,
        render_plan,
        render_rejections,
        verdict,
    )
    from fastllm_planner.search import search
    from fastllm_planner.search_json import result_to_json
    from fastllm_planner.trainer import BACKEND, trainer_pins, trainer_words

    check_targets(emit)
    job = build_job(options)
    for_trainer = bool(emit) and (job.backend.name == BACKEND or trains(emit))
    if for_trainer:
        check_job(job)
    pins = (trainer_pins(job.spec) if for_trainer else {}) | read_pins(fix)
    result = search(job, top_k=top_k, pinned=pins)
    plans = [price_layout(job, candidate.layout) for candidate in result.ranked]
    for target in emit if plans else ():
        emit_plan(plans[0], target, model=options["model"])
        click.echo(f"wrote {target}", err=True)
    for target in emit if plans else ():
        if target.suffix == ".toml":
            click.echo(_follow_up(target), err=True)
    words = trainer_words(plans[0], pins) if plans else ""
    if as_json:
        sentence = verdict(plans[0]) if plans else render_no_fit(job, result)
        click.echo(
            json.dumps(result_to_json(job, result, plans, sentence, explain, words), indent=2)
        )
    else:
        blocks = [render_plan(plans[0], words), render_alternatives(plans)] if plans else []
        blocks = blocks or [render_no_fit(job, result)]
        blocks += [_searched(pins)] if pins else []
        blocks += [render_rejections(result)] if explain else []
        click.echo("\n\n".join([*blocks, render_assumptions(job, plans[0] if plans else None)]))
    return 0 if plans else 1


def _follow_up(target: Path) -> str:
    """The command that takes a train.toml: it holds no data, which only the user knows."""
    return f"next: fastllm-train check {shlex.quote(str(target))} 'data.paths=[\"PREFIX\"]'"


def _searched(pins: dict[str, Any]) -> str:
    """What was not searched, because it was fixed or because fastllm-train cannot run it."""
    fixed = ", ".join(f"{axis}={str(value).lower()}" for axis, value in pins.items())
    return f"Searched with {fixed} only."


def read_pins(pairs: Sequence[str]) -> dict[str, Any]:
    """``["tp=4", "recompute=full"]`` → pins of the search; ``UserError`` for an unknown axis."""
    import difflib

    from fastllm_planner.search import PINNABLE

    pins: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in PINNABLE:
            near = difflib.get_close_matches(name, PINNABLE, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}=…?" if near else f"axes: {', '.join(PINNABLE)}"
            raise UserError(f"--fix {pair}: not AXIS=VALUE of the search", hint)
        if name in pins:
            raise UserError(f"--fix {pair}: {name} is fixed already", "give each axis once")
        allowed = {str(choice).lower(): choice for choice in PINNABLE[name]}
        value = value.strip().lower()
        if allowed:
            if value not in allowed:
                raise UserError(f"--fix {pair}: no such value", f"one of {', '.join(allowed)}")
            pins[name] = allowed[value]
        elif value.isdecimal() and 0 < int(value) < 2**31:
            pins[name] = int(value)
        else:
            raise UserError(f"--fix {pair}: {name} is a positive whole number")
    return pins
