"""``tflops``: the after-training calculator."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fastllm_planner.cli.options import COUNT, WHOLE, load_model, verb
from fastllm_planner.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastllm_planner.tflops import Measured, Rate

EXAMPLE = (
    "fastllm-planner tflops --params 7e9 --seq-len 4096 --global-batch 128 \\\n"
    "             --iter-time 6.8 --gpus 32"
)


@verb("tflops", EXAMPLE)
@click.option("--params", type=COUNT, help="Parameters: 7e9, 7B.")
@click.option("--model", metavar="NAME|FILE", help="Counts attention too; gives --params.")
@click.option("--seq-len", type=WHOLE, required=True, help="Tokens per sequence.")
@click.option("--global-batch", type=WHOLE, required=True, help="Sequences a step.")
@click.option("--iter-time", type=COUNT, required=True, help="Seconds a step.")
@click.option("--gpus", type=WHOLE, required=True)
@click.option("--gpu", metavar="NAME", help="Adds MFU, of its dense bf16 peak.")
@click.option("--peak", type=COUNT, help="Adds MFU, of this many TFLOPs.")
@click.option("--recompute", type=click.Choice(["none", "selective", "full"]), default="none")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool, **options: Any) -> int:
    """TFLOPs of a finished run, by convention."""
    from fastllm_planner.arch import count_active_params
    from fastllm_planner.tflops import Measured, rates

    spec = load_model(options["model"]) if options["model"] else None
    params = options["params"] or (count_active_params(spec) if spec else None)
    if params is None:
        raise UserError("give --params or --model", "--model also counts attention")
    measured = Measured(
        options["global_batch"], options["seq_len"], options["iter_time"], options["gpus"]
    )
    peak, peak_name = _peak(options)
    found = rates(measured, params, spec, options["recompute"])
    if as_json:
        click.echo(json.dumps(_as_json(measured, params, found, peak, peak_name), indent=2))
        return 0
    click.echo(_as_text(measured, params, found, peak, peak_name))
    if spec is None:
        click.echo("note: give --model to count attention (model and hardware FLOPs)", err=True)
    return 0


def _peak(options: dict[str, Any]) -> tuple[float | None, str]:
    """TFLOPs that MFU refers to, and what they are."""
    if options["peak"]:
        return options["peak"], "given"
    if not options["gpu"]:
        return None, ""
    from fastllm_planner.hardware import gpu

    device = gpu(options["gpu"])
    dtype = "bf16" if device.supports("bf16") else "fp16"
    return device.peak(dtype), f"{device.name}, dense {dtype}"


def _as_text(
    measured: Measured, params: float, found: Sequence[Rate], peak: float | None, peak_name: str
) -> str:
    from fastllm_planner.columns import columns

    headers = ["convention", "counts", "FLOPs/token", "TFLOPs/GPU"]
    rows = [
        [rate.name, rate.formula, f"{rate.flops_per_token:.4g}", f"{rate.tflops:.2f}"]
        for rate in found
    ]
    if peak is not None:
        headers.append("of peak")
        for row, rate in zip(rows, found, strict=True):
            row.append(f"{100 * rate.tflops / peak:.1f}%")
    lines = [
        f"{measured.tokens_per_s_per_device:,.0f} tokens/s per GPU "
        f"({measured.tokens:,} tokens a step, {params:,.0f} parameters)",
        "",
        columns(headers, rows, left=2),
    ]
    if peak is not None:
        lines += ["", f"Peak: {peak:g} TFLOPs ({peak_name})."]
    return "\n".join(lines)


def _as_json(
    measured: Measured, params: float, found: Sequence[Rate], peak: float | None, peak_name: str
) -> dict[str, Any]:
    return {
        "schema": 1,
        "params": params,
        "tokens_per_step": measured.tokens,
        "tokens_per_s_per_gpu": measured.tokens_per_s_per_device,
        "peak_tflops": peak,
        "peak": peak_name,
        "tflops": {rate.key: rate.tflops for rate in found},
        "flops_per_token": {rate.key: rate.flops_per_token for rate in found},
        "share_of_peak": None if peak is None else {r.key: r.tflops / peak for r in found},
    }
