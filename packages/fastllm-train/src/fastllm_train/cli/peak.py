"""``fastllm-train peak``: the GEMM peak of this machine."""

from __future__ import annotations

import json

import click

from fastllm_train.cli.app import verb


@verb("peak", "fastllm-train peak --dtype bf16")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; all cores if not given.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(dtype: str, device: str, threads: int | None, as_json: bool) -> None:
    """Measure the best matrix-product rate, which MFU on CPU is measured against."""
    import torch

    from fastllm_train.distributed import pick_device, usable_cores
    from fastllm_train.peak import GEMM_SIZES, datasheet_tflops, gemm_tflops
    from fastllm_train.precision import PrecisionConfig

    place = pick_device(device)
    torch.set_num_threads(threads or usable_cores())
    name = "cpu" if place == "cpu" else torch.cuda.get_device_name()
    kind = PrecisionConfig(dtype="bf16" if dtype == "bf16" else "fp32").torch_dtype
    measured = gemm_tflops(kind, torch.device(place))
    result = {
        "device": name,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "gemm_tflops": measured,
        "gemm_sizes": list(GEMM_SIZES),
        "datasheet_tflops": None if place == "cpu" else datasheet_tflops(name, dtype),
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    sheet = result["datasheet_tflops"]
    tail = f", data sheet {sheet:.1f}" if sheet else ""
    where = f"{name}, {result['threads']} threads" if place == "cpu" else name
    click.echo(f"{dtype} GEMM on {where}: {measured:.4f} TFLOP/s{tail}")
