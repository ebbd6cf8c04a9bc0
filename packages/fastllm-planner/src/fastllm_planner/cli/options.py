"""Option types and the group's shared options: counts with suffixes, models by name or file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fastllm_planner.cli.app import ExampleCommand
from fastllm_planner.errors import UserError

if TYPE_CHECKING:
    from fastllm_planner.arch import ArchSpec

_SUFFIX = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


# click before 8.3 has no generic ParamType; type checkers see the newer stubs.
if TYPE_CHECKING:
    _FloatType = click.ParamType[float]
    _IntType = click.ParamType[int]
else:
    _FloatType = _IntType = click.ParamType


class Count(_FloatType):
    """A positive number, with an optional suffix: ``7e9``, ``0.7B``, ``1T``."""

    name = "number"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        text = str(value).strip().lower().replace("_", "").replace(",", "")
        scale = _SUFFIX.get(text[-1:], 0.0)
        digits = text[:-1] if scale else text
        try:
            number = float(digits) * (scale or 1.0)
        except ValueError:
            self.fail(f"{value!r} is not a number (write 7e9, 0.7B or 1T)", param, ctx)
        if not math.isfinite(number) or number <= 0:
            self.fail(f"{value!r} is not a positive number", param, ctx)
        return number


class Whole(_IntType):
    """An integer of at least 1 (``IntRange`` would repeat its bound in every line of help)."""

    name = "int"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number", param, ctx)
        if not 1 <= number < 2**53:
            self.fail(f"{value!r} is not a positive whole number", param, ctx)
        return number


COUNT = Count()
WHOLE = Whole()


def verb(name: str, example: str, **settings: Any) -> Callable[..., ExampleCommand]:
    """Decorator: a command of the group whose help starts with ``example``."""

    def decorate(function: Callable[..., Any]) -> ExampleCommand:
        command = click.command(name, cls=ExampleCommand, **settings)(function)
        command.example = example
        return command

    return decorate


def load_model(name: str) -> ArchSpec:
    """A preset's name, a ``config.json``, or a folder that holds one → spec."""
    from pathlib import Path

    from fastllm_planner.arch import preset, read_hf_config

    path = Path(name)
    looks_like_path = name.endswith(".json") or "/" in name
    if looks_like_path and not path.exists():
        raise UserError(
            f"no file {name}", "give a preset ('fastllm-planner models' lists them) or config.json"
        )
    if path.is_file() or (path / "config.json").is_file():
        return read_hf_config(path)
    return preset(name)
