"""Options that several verbs share, and what they mean. Imports click and nothing heavy."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fastllm_convert.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = ("hf", "deepspeed")
TARGETS = ("hf",)


def path_argument(name: str) -> Callable[[F], F]:
    return click.argument(name, type=click.Path(path_type=Path))


def source_options(command: F) -> F:
    """How to read the source."""
    for option in reversed(
        [
            click.option(
                "--from",
                "source_format",
                type=click.Choice(FORMATS),
                help="Source format [detected].",
            ),
            click.option(
                "--config",
                type=click.Path(path_type=Path),
                help="config.json of the model, when the source has none.",
            ),
            click.option(
                "--weights",
                type=click.Choice(["model", "master"]),
                default="model",
                show_default=True,
                help="DeepSpeed: the weights the model used, or the fp32 masters.",
            ),
        ]
    ):
        command = option(command)
    return command


def target_options(command: F) -> F:
    """What to write."""
    for option in reversed(
        [
            click.option("--to", "target", type=click.Choice(TARGETS), required=True),
            click.option("--dtype", help="Cast weights: bf16, fp16 or fp32 [kept as stored]."),
            click.option(
                "--shard-size", default="5GB", show_default=True, help="Largest weights file."
            ),
        ]
    ):
        command = option(command)
    return command


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
