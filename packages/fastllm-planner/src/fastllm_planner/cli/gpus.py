"""``gpus``: list the devices that a plan can run on."""

from __future__ import annotations

import json

import click

from fastllm_planner.cli.options import verb

EXAMPLE = "fastllm-planner gpus"


@verb("gpus", EXAMPLE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> int:
    """List the known GPUs."""
    from dataclasses import asdict

    from fastllm_planner.hardware import GIB, gpu, gpu_names

    devices = {name: gpu(name) for name in gpu_names()}
    if as_json:
        table = {name: asdict(device) for name, device in devices.items()}
        click.echo(json.dumps({"schema": 1, "gpus": table}))
        return 0
    from fastllm_planner.columns import columns

    rows = [
        [
            name,
            f"{device.memory_bytes / GIB:.1f}",
            *_rates(device.peak_tflops, device.matmul_tflops),
            _measured(device.matmul_source),
            f"{device.memory_bandwidth / 1e9:.0f}",
            f"{device.intra_node_bandwidth / 1e9:.0f}",
            f"{device.inter_node_bandwidth / 1e9:g}",
        ]
        for name, device in devices.items()
    ]
    headers = ["name", "GiB", "peak TF", "matmul TF", "measured", "HBM GB/s", "node", "network"]
    click.echo(columns(headers, rows))
    return 0


def _measured(source: str) -> str:
    """``matmul_source`` for a column: yes, no, or the board that was measured."""
    if source.startswith("as measured "):
        return source.removeprefix("as measured ")
    return "yes" if source == "measured" else "no"


def _rates(
    peak: tuple[tuple[str, float], ...], matmul: tuple[tuple[str, float], ...]
) -> tuple[str, str]:
    """bf16 rates, or fp16's where there is no bf16."""
    peaks, ceilings = dict(peak), dict(matmul)
    dtype = "bf16" if "bf16" in peaks else "fp16"
    return f"{peaks[dtype]:.4g} {dtype}", f"{ceilings[dtype]:.4g}"
