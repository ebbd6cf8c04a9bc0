"""Options that several verbs share, and what they mean. Imports click and nothing heavy."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastllm_convert.errors import UserError

if TYPE_CHECKING:
    from fastllm_convert.conversion import SourceOptions, TargetOptions

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = (
    "hf",
    "meta",
    "deepspeed",
    "megatron-deepspeed",
    "universal",
    "megatron",
    "torch_dist",
)
TARGETS = ("hf", "meta", "megatron", "deepspeed", "megatron-deepspeed")


def path_argument(name: str) -> Callable[[F], F]:
    return click.argument(name, type=click.Path(path_type=Path))


_SOURCE = [
    click.option(
        "--from", "source_format", type=click.Choice(FORMATS), help="Source format [detected]."
    ),
    click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="config.json of the model, when the source has none or a wrong one.",
    ),
    click.option(
        "--weights",
        type=click.Choice(["model", "master"]),
        default="model",
        show_default=True,
        help="DeepSpeed: the weights the model used, or the fp32 masters.",
    ),
    click.option(
        "--qkv-layout",
        type=click.Choice(["auto", "interleaved", "concat"]),
        default="auto",
        show_default=True,
        help="Megatron: row order of the fused q, k, v.",
    ),
    click.option("--vocab-size", type=click.IntRange(1), help="Megatron: rows without padding."),
    click.option("--max-seq-len", type=click.IntRange(1), help="Meta: context length."),
    click.option("--rope-factor", type=float, help="Meta: factor of use_scaled_rope."),
]
_TARGET = [
    click.option("--to", "target", type=click.Choice(TARGETS), required=True),
    click.option("--dtype", help="Cast weights: bf16, fp16 or fp32 [kept as stored]."),
    click.option("--tp", type=click.IntRange(1), default=1, help="Tensor-parallel size, shards."),
    click.option("--pp", type=click.IntRange(1), default=1, help="Pipeline-parallel size."),
    click.option("--vp", type=click.IntRange(1), default=1, help="Virtual stages per stage."),
    click.option("--ep", type=click.IntRange(1), default=1, help="megatron: expert-parallel size."),
    click.option("--shard-size", default="5GB", show_default=True, help="hf: largest file."),
    click.option(
        "--vocab-pad",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        help="megatron: pad the vocabulary to a multiple of this times tp.",
    ),
    click.option(
        "--target-qkv-layout",
        type=click.Choice(["interleaved", "concat"]),
        default="interleaved",
        show_default=True,
        help="megatron-deepspeed: row order of the fused q, k, v.",
    ),
    click.option(
        "--megatron-layout",
        type=click.Choice(["core", "core-te", "legacy"]),
        default="core",
        show_default=True,
        help="megatron: generation of names.",
    ),
]


def source_options(command: F) -> F:
    """How to read the source."""
    for option in reversed(_SOURCE):
        command = option(command)
    return command


def target_options(command: F) -> F:
    """What to write."""
    for option in reversed(_TARGET):
        command = option(command)
    return command


def read_options(given: dict[str, Any]) -> SourceOptions:
    """The values of ``source_options``."""
    from fastllm_convert.conversion import SourceOptions

    qkv = given["qkv_layout"]
    return SourceOptions(
        format=given["source_format"],
        config=given["config"],
        weights=given["weights"],
        qkv=None if qkv == "auto" else qkv,
        vocab_size=given["vocab_size"],
        max_seq_len=given["max_seq_len"],
        rope_factor=given["rope_factor"],
        tokenizer_model=given.get("tokenizer_model"),
    )


def write_options(given: dict[str, Any]) -> TargetOptions:
    """The values of ``target_options``."""
    from fastllm_convert.conversion import TargetOptions

    return TargetOptions(
        format=given["target"],
        dtype=given["dtype"],
        shard_bytes=parse_bytes(given["shard_size"]),
        tp=given["tp"],
        pp=given["pp"],
        vp=given["vp"],
        ep=given["ep"],
        vocab_multiple=given["vocab_pad"],
        dialect=given["megatron_layout"],
        qkv=given.get("target_qkv_layout", "interleaved"),
    )


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")

_UNITS = {
    **{"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30},
}


def parse_bytes(text: str) -> int:
    """``5GB``, ``500MB``, ``2GiB`` → bytes (powers of 1000, as transformers counts)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", text, re.IGNORECASE)
    if found is None or found[2].upper() not in _UNITS:
        raise UserError(f"--shard-size {text!r} is not a size", hint="for example 5GB or 500MB")
    value = int(float(found[1]) * _UNITS[found[2].upper()])
    if value < 1:
        raise UserError(f"--shard-size {text!r} is not a positive size")
    return value


def say(text: str) -> None:
    """Everything that is not the result goes to stderr."""
    print(text, file=sys.stderr)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """The result: one JSON object, or text for people."""
    print(json.dumps(result) if as_json else text)


def human_bytes(count: float) -> str:
    """Powers of 1000: ``2.43 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
