"""``fastllm-train check``: is a config sound, and what does it lead to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fastllm_train.cli.app import verb


@verb("check", "fastllm-train check configs/quickstart.toml parallel.dp=4")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--memory", is_flag=True, help="Trace a rank's peak memory (minutes, no GPU).")
@click.option("--gpu", metavar="NAME", help="With --memory: does it fit? Exit status 1 if not.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    config: Path, overrides: tuple[str, ...], memory: bool, gpu: str | None, as_json: bool
) -> int:
    """Check CONFIG as ``run`` would, start nothing, and show what it resolves to: parameters,
    layout, batch, engine and, where that is DeepSpeed, its generated configuration.

    --memory runs training steps of one rank of each kind of pipeline stage on tensors without
    memory, and shows their peak beside the planner's prediction.
    """
    from fastllm_train.config import load_config
    from fastllm_train.refusals import refuse
    from fastllm_train.summary import summarise

    settings = load_config(config, overrides)
    spec = settings.model.resolve()
    refuse(settings, spec)
    if gpu and not memory:
        raise click.UsageError("--gpu goes with --memory")
    summary = summarise(settings, spec)
    if memory:
        from fastllm_train.trace.report import memory_report

        summary["memory"] = memory_report(settings, spec, gpu)
    click.echo(json.dumps(summary) if as_json else _text(summary))
    return 0 if summary.get("memory", {}).get("fits", True) else 1


def _engine(summary: dict[str, Any]) -> str:
    if summary["config"]["speed"]["engine"] != "auto" or not summary["only_deepspeed"]:
        return summary["engine"]
    return f"{summary['engine']}, for {summary['only_deepspeed']}"


def _text(summary: dict[str, Any]) -> str:
    parallel, batch = summary["parallel"], summary["batch"]
    sizes = " × ".join(f"{name} {parallel[name]}" for name in ("dp", "tp", "pp", "cp", "ep"))
    zero = f"{summary['zero_stage']}"
    if summary["zero_note"]:
        zero += f" (asked for {parallel['zero_stage']}: {summary['zero_note']})"
    rows = [
        ("model", f"{summary['arch']['family']}, {summary['params']:,} parameters"),
        ("processes", f"{summary['world_size']} = {sizes}"),
        ("engine", _engine(summary)),
        ("ZeRO stage", zero),
        ("offload, recompute", f"{parallel['offload']}, {parallel['recompute']}"),
        (
            "batch",
            f"{batch['global']} sequences of {batch['seq_len']} tokens = "
            f"{summary['tokens_per_step']:,} tokens a step; "
            f"{summary['accumulation']} × {batch['micro']} per device",
        ),
        ("steps", f"{summary['steps']:,} = {summary['tokens']:,} tokens"),
        ("FLOPs per token", f"{summary['flops_per_token_full']:.4g} (model, full attention)"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if summary["deepspeed_config"] is not None:
        lines += ["DeepSpeed configuration", json.dumps(summary["deepspeed_config"], indent=2)]
    if "memory" in summary:
        from fastllm_train.trace.report import memory_text

        lines.append(memory_text(summary["memory"]))
    return "\n".join(lines)
