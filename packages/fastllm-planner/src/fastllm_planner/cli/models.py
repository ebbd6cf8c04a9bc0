"""``models``: list the presets, or describe one model."""

from __future__ import annotations

import json

import click

from fastllm_planner.cli.options import load_model, verb

EXAMPLE = "fastllm-planner models llama-3-8b"


@verb("models", EXAMPLE)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(name: str | None, as_json: bool) -> int:
    """List the known models, or show one."""
    from fastllm_planner.arch import (
        count_active_params,
        count_params,
        preset,
        preset_names,
        spec_to_dict,
    )

    if name is not None:
        spec = load_model(name)
        table = {
            "params": count_params(spec),
            "active_params": count_active_params(spec),
            **spec_to_dict(spec),
        }
        text = "\n".join(f"{key:<22} {value}" for key, value in table.items())
        click.echo(json.dumps({"schema": 1, "name": name, **table}) if as_json else text)
        return 0
    counts = {known: count_params(preset(known)) for known in preset_names()}
    if as_json:
        click.echo(json.dumps({"schema": 1, "models": counts}))
    else:
        click.echo("\n".join(f"{known:<18} {params:>18,}" for known, params in counts.items()))
    return 0
