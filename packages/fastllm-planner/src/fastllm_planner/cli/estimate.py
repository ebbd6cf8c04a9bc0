"""``estimate``: memory and time of one given layout."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fastllm_planner.cli.job_options import build_job, job_options
from fastllm_planner.cli.options import WHOLE, verb
from fastllm_planner.errors import UserError

if TYPE_CHECKING:
    from fastllm_planner.plan import Job

EXAMPLE = "fastllm-planner estimate --model llama-3-8b --gpu H100-SXM --gpus 64 --tp 4"


@verb("estimate", EXAMPLE)
@job_options
@click.option("--dp", type=WHOLE, help="Data parallel.  [default: what remains]")
@click.option("--tp", type=WHOLE, default=1, show_default=True, help="Tensor parallel.")
@click.option("--pp", type=WHOLE, default=1, show_default=True, help="Pipeline stages.")
@click.option("--virtual-stages", type=WHOLE, default=1, show_default=True, help="Per rank.")
@click.option("--cp", type=WHOLE, default=1, show_default=True, help="Context parallel.")
@click.option("--ep", type=WHOLE, default=1, show_default=True, help="Expert parallel.")
@click.option("--zero-stage", type=click.IntRange(0, 3), default=1, show_default=True)
@click.option("--micro-batch", type=WHOLE, default=1, show_default=True)
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), default="none")
@click.option("--sequence-parallel/--no-sequence-parallel", default=None)
@click.option(
    "--offload", type=click.Choice(["none", "optimizer", "optimizer+params"]), default="none"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool, **options: Any) -> int:
    """Memory and time of one given layout."""
    from fastllm_planner.layout import Layout
    from fastllm_planner.plan import price_layout
    from fastllm_planner.plan_text import render_assumptions, render_plan, verdict
    from fastllm_planner.search_json import estimate_to_json

    job = build_job(options)
    model_parallel = options["tp"] * options["pp"] * options["cp"]
    dp = options["dp"] or job.cluster.n_gpus // model_parallel
    if options["dp"] is None and job.cluster.n_gpus % model_parallel:
        raise UserError(
            f"tp x pp x cp = {options['tp']} x {options['pp']} x {options['cp']} does not divide "
            f"{job.cluster.n_gpus} GPUs",
            _sizes_hint(job, options["tp"]),
        )
    if dp < 1 or dp * model_parallel != job.cluster.n_gpus:
        raise UserError(
            f"{job.cluster.n_gpus} GPUs are not dp x tp x pp x cp = "
            f"{dp} x {options['tp']} x {options['pp']} x {options['cp']}",
            "leave --dp away to fill the cluster",
        )
    sequence = options["sequence_parallel"]
    layout = Layout(
        dp=dp,
        sequence_parallel=options["tp"] > 1 if sequence is None else sequence,
        global_batch=job.global_batch,
        seq_len=job.seq_len,
        dtype=job.dtype,  # pyright: ignore[reportArgumentType]
        flash=job.flash,
        **{name: options[name] for name in _LAYOUT_NAMES},
    )
    reasons = job.reasons_against(layout)
    plan = price_layout(job, layout)
    sentence = verdict(plan)
    if reasons:
        sentence = f"{job.name}: this layout cannot run: {'; '.join(reasons)}."
    if as_json:
        click.echo(json.dumps(estimate_to_json(plan, sentence, reasons), indent=2))
    elif reasons:
        listed = "".join(f"\n  - {reason}" for reason in reasons)
        click.echo(f"{job.name}: this layout cannot run:{listed}")
    else:
        click.echo(f"{render_plan(plan)}\n\n{render_assumptions(job, plan)}")
    return 0 if plan.fits and not reasons else 1


def _sizes_hint(job: Job, tp: int) -> str:
    """Tensor-parallel sizes that divide the cluster and the heads, where ``tp`` does not."""
    n_gpus, heads = job.cluster.n_gpus, job.spec.heads
    if heads % tp == 0 and n_gpus % tp == 0:
        return f"choose sizes whose product divides {n_gpus}"
    sizes = [
        size for size in range(1, min(n_gpus, heads) + 1) if not (n_gpus % size or heads % size)
    ]
    return f"--tp divides the GPUs and the model's {heads} heads: one of {str(sizes)[1:-1]}"


_LAYOUT_NAMES = (
    *("tp", "pp", "virtual_stages", "cp", "ep", "zero_stage", "micro_batch", "recompute"),
    "offload",
)
