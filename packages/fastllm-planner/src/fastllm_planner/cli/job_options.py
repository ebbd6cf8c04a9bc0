"""The options that describe a job, shared by ``plan``, ``estimate``, ``report`` and ``serve``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastllm_planner.cli.options import COUNT, WHOLE, load_model
from fastllm_planner.errors import UserError

if TYPE_CHECKING:
    from fastllm_planner.plan import Job

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--model", required=True, metavar="NAME|FILE", help="Preset or config.json."),
    click.option("--gpu", required=True, metavar="NAME", help="'fastllm-planner gpus' lists them."),
    click.option("--gpus", type=WHOLE, required=True, help="Number of GPUs."),
    click.option("--gpus-per-node", type=WHOLE, help="[default: 8]"),
    click.option("--gpu-memory", type=COUNT, metavar="GIB", help="Memory per GPU."),
    click.option("--network", type=COUNT, metavar="GB/S", help="Per GPU between nodes."),
    click.option(
        "--host-memory", type=COUNT, metavar="GIB", help="Per node.  [default: twice its GPUs']"
    ),
    click.option("--nvme", type=COUNT, metavar="GIB", help="Drives per node, for offload."),
    click.option("--global-batch", type=WHOLE, help="Sequences a step.  [default: ~4M tokens]"),
    click.option("--seq-len", type=WHOLE, help="[default: the model's, at most 4096]"),
    click.option("--tokens", type=COUNT, help="To train on: 1e12, 1T."),
    click.option("--backend", default="fastllm", show_default=True, help="Training stack."),
    click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32", "fp8"])),
    click.option("--no-flash", is_flag=True, help="Attention that stores its scores."),
    click.option("--tp-across-nodes", is_flag=True, help="Let TP leave the node."),
    click.option("--price", type=COUNT, help="Per GPU-hour."),
    click.option("--goodput", type=COUNT, default=0.9, show_default=True),
    click.option(
        "--headroom", type=float, default=0.05, show_default=True, help="Memory kept free."
    ),
    click.option("--profile", type=click.Path(path_type=Path), help="From calibrate."),
)


def job_options(function: F) -> F:
    """Decorator: add the options of a job."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def build_job(options: dict[str, Any]) -> Job:
    """The job that the options describe. ``UserError`` for what cannot be."""
    from fastllm_planner.backends import backend
    from fastllm_planner.hardware import GIB, Cluster, gpu, with_memory
    from fastllm_planner.plan import (
        DEFAULT_HOST_SHARE,
        DEFAULT_SEQ_LEN,
        Job,
        default_batch,
        default_dtype,
    )
    from fastllm_planner.profile import load_profile

    name = options["model"]
    spec = load_model(name)
    n_gpus = options["gpus"]
    device = gpu(options["gpu"])
    dtype = options["dtype"] or default_dtype(device)
    device.peak(dtype)  # refuses a dtype that the device lacks
    per_node = options["gpus_per_node"] or (n_gpus if device.architecture == "cpu" else 8)
    per_node = min(per_node, n_gpus)
    if options["gpu_memory"]:
        ranks = per_node if device.architecture == "cpu" else 1  # which share the machine
        device = with_memory(device, int(options["gpu_memory"] * ranks * GIB))
    network = options["network"]
    host = DEFAULT_HOST_SHARE * per_node * device.memory_bytes
    if options["host_memory"]:
        host = int(options["host_memory"] * GIB)
    cluster = Cluster(
        gpu=device,
        n_gpus=n_gpus,
        gpus_per_node=per_node,
        inter_node_bandwidth=network * 1e9 if network else None,
        host_memory_bytes=host,
        nvme_bytes=int(options["nvme"] * GIB) if options["nvme"] else None,
    )
    seq_len = options["seq_len"] or min(spec.max_seq_len, DEFAULT_SEQ_LEN)
    if seq_len > 2**24 or n_gpus > 2**22:
        raise UserError("--seq-len and --gpus are limited to 16M tokens and 4M devices")
    stack = backend(options["backend"])
    profile = load_profile(options["profile"]) if options["profile"] else None
    if profile and (profile.gpu, profile.backend) not in ((device.name, stack.name), ("", "")):
        raise UserError(
            f"{options['profile']} is of {profile.gpu} with {profile.backend}, "
            f"the plan is for {device.name} with {stack.name}",
            "leave --profile away, or run calibrate for this GPU and backend",
        )
    return Job(
        name=_display_name(name),
        spec=spec,
        cluster=cluster,
        backend=stack,
        global_batch=options["global_batch"] or default_batch(seq_len, n_gpus),
        seq_len=seq_len,
        dtype=dtype,
        flash=not options["no_flash"],
        tokens=options["tokens"],
        price=options["price"],
        goodput=options["goodput"],
        headroom=options["headroom"],
        profile=profile,
        tp_across_nodes=options["tp_across_nodes"],
    )


def _display_name(model: str) -> str:
    """What a model is called in words and comments: a preset or a folder; one printable line."""
    path = Path(model)
    if path.name == "config.json" or path.is_dir():
        folder = path.parent if path.name == "config.json" else path
        model = folder.resolve().name or "model"
    elif path.suffix == ".json":
        model = path.stem
    return "".join(char if char.isprintable() else "?" for char in model)
