"""``classic``: the reference calculator."""

from __future__ import annotations

import json
from typing import Any

import click

from fastllm_planner.cli.options import COUNT, WHOLE, load_model, verb
from fastllm_planner.errors import UserError

EXAMPLE = "fastllm-planner classic --model llama-2-70b --nodes 6 --gpus-per-node 4 --tokens 0.7B"


@verb("classic", EXAMPLE)
@click.option("--model", metavar="NAME|FILE", help="Take the sizes from a preset or config.json.")
@click.option("--hidden", type=WHOLE, help="Hidden size h.")
@click.option("--layers", type=WHOLE, help="Layers l.")
@click.option("--seq-len", type=WHOLE, help="Sequence length s.")
@click.option("--vocab", type=WHOLE, help="Vocabulary v.")
@click.option("--nodes", type=WHOLE, default=1, show_default=True)
@click.option("--gpus-per-node", type=WHOLE, default=8, show_default=True)
@click.option("--gpu-memory", type=COUNT, default=80, show_default=True, help="GB per GPU.")
@click.option("--batch-size", type=WHOLE, default=8, show_default=True)
@click.option("--tokens", type=COUNT, required=True, help="0.7B, 7e8; below 1e5: billions.")
@click.option("--tflops", type=COUNT, default=140, show_default=True, help="Achieved per GPU.")
@click.option("--no-gradient-checkpointing", is_flag=True, help="No square root of activations.")
@click.option("--heads", type=WHOLE, help="Add 5*a*s^2*b: attention without FlashAttention.")
@click.option("--experts", type=WHOLE, help="Experts per layer (MoE).")
@click.option("--active-experts", type=WHOLE, help="Experts one token uses.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool, no_gradient_checkpointing: bool, **options: Any) -> int:
    """The classic calculator: size, memory, ZeRO, days."""
    from fastllm_planner.classic import ClassicInput, compute
    from fastllm_planner.classic_tables import render

    sizes = _sizes(options)
    inputs = ClassicInput(
        **sizes,
        nodes=options["nodes"],
        gpus_per_node=options["gpus_per_node"],
        gpu_memory=options["gpu_memory"],
        batch_size=options["batch_size"],
        tokens=_tokens(options["tokens"]),
        tflops=options["tflops"],
        gradient_checkpointing=not no_gradient_checkpointing,
        heads=options["heads"],
    )
    if inputs.gpu_memory <= 1:
        raise UserError("--gpu-memory must be above 1 GB: one is reserved for the runtime")
    result = compute(inputs)
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else render(result))
    return 1 if result.outcome == "not_enough" else 0


def _sizes(options: dict[str, Any]) -> dict[str, int]:
    """Sizes from the flags, completed from ``--model`` where a flag is absent."""
    known: dict[str, int] = {}
    if options["model"]:
        spec = load_model(options["model"])
        known = {
            "hidden": spec.hidden,
            "layers": spec.layers,
            "seq_len": spec.max_seq_len,
            "vocab": spec.vocab,
        }
        if spec.moe is not None:
            known |= {"experts": spec.moe.experts, "active_experts": spec.moe.active_experts}
    names = ("hidden", "layers", "seq_len", "vocab", "experts", "active_experts")
    known |= {name: options[name] for name in names if options[name] is not None}
    missing = [f"--{n.replace('_', '-')}" for n in names[:4] if n not in known]
    if missing:
        raise UserError(f"missing {', '.join(missing)}", "give the sizes, or --model NAME")
    if known.get("active_experts", 1) > known.get("experts", 1):
        raise UserError(
            f"--active-experts {known['active_experts']} is more than "
            f"--experts {known.get('experts', 1)}"
        )
    return known


def _tokens(value: float) -> float:
    """The classic calculator counts tokens in billions; no training run has under 1e5 tokens."""
    if value >= 1e5:
        return value
    click.echo(f"note: --tokens {value:g} is read as {value:g} billion", err=True)
    return value * 1e9
