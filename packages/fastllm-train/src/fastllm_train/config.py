"""The training config: TOML with a ``base``, ``section.key=value`` overrides, checked as built.

Each section is a frozen dataclass that its own module defines and validates; this module only
layers tables, finds misspelt keys and checks value types. It imports no framework.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastllm_train.architecture import SOURCES, ModelConfig
from fastllm_train.checkpoint import CheckpointConfig
from fastllm_train.data import DataConfig
from fastllm_train.errors import UserError
from fastllm_train.evaluation import EvalConfig
from fastllm_train.layout import BatchConfig, ParallelConfig
from fastllm_train.optimizer import OptimConfig
from fastllm_train.precision import PrecisionConfig
from fastllm_train.profiling import ProfileConfig
from fastllm_train.run_folder import RunConfig
from fastllm_train.schedule import UNITS, ScheduleConfig
from fastllm_train.sinks import LoggingConfig
from fastllm_train.speed import SpeedConfig
from fastllm_train.spikes import SpikesConfig

MAX_BASES = 8
# Keys of a section of which one is set: how the model is named, what the run's length is given in.
ALTERNATIVES = {"model": SOURCES, "schedule": UNITS}


@dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    model: ModelConfig
    parallel: ParallelConfig
    batch: BatchConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    speed: SpeedConfig
    spikes: SpikesConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    logging: LoggingConfig
    profile: ProfileConfig
    run: RunConfig


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` over its bases, apply the overrides, check every key and value.

    An override ``base=FILE`` names another base; like all paths on the command line it is relative
    to the working directory.
    """
    bases = [text.removeprefix("base=") for text in overrides if text.startswith("base=")]
    table = _read_layers(path, seen=(), base=Path(bases[-1]) if bases else None)
    for text in overrides:
        if not text.startswith("base="):
            table = _merge(table, parse_override(text))
    return build_config(table)


def parse_override(text: str) -> dict[str, Any]:
    """``section.key=value`` → nested tables. The value is TOML; anything else is a string."""
    name, equals, raw = text.partition("=")
    parts = name.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UserError(f"{text!r} is not section.key=value", hint="for example optim.lr=3e-4")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    nested: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        nested = {part: nested}
    return nested


def build_config(table: Mapping[str, Any]) -> Config:
    """Nested tables → ``Config``. ``UserError`` names a wrong key and the one nearest to it."""
    types_of = typing.get_type_hints(Config)
    for section, values in table.items():
        if section not in types_of:
            raise _unknown(section, list(types_of), "section")
        if not isinstance(values, Mapping):
            raise UserError(f"{section} is a table, not a value", hint=f"write [{section}]")
    built = {name: _section(name, kind, table.get(name, {})) for name, kind in types_of.items()}
    return Config(**built)


def to_table(config: Config) -> dict[str, Any]:
    """The resolved config as nested tables, TOML spelling; ``build_config`` inverts it."""
    table: dict[str, Any] = {}
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        rows = {_key(f): getattr(value, f.name) for f in dataclasses.fields(value)}
        table[section.name] = {
            key: list(row) if isinstance(row, tuple) else row
            for key, row in rows.items()
            if not (section.name == "model" and not row)
        }
    return table


def _read_layers(path: Path, seen: tuple[Path, ...], base: Path | None = None) -> dict[str, Any]:
    file = path.resolve()
    if file in seen or len(seen) >= MAX_BASES:
        raise UserError(f"{path}: base = … leads back to itself or nests too deep")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        hint = f"{seen[-1]} names it as its base" if seen else ""
        raise UserError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    named = table.pop("base", None)
    if named is not None and not isinstance(named, str):
        raise UserError(f"{path}: base must be the name of a file, not {named!r}")
    below = base if base is not None or named is None else file.parent / named
    return table if below is None else _merge(_read_layers(below, (*seen, file)), table)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    merged = dict(below)
    choices = ALTERNATIVES.get(at, ())
    if any(name in above for name in choices):
        # Saying it another way replaces what is below, it does not contradict it.
        merged = {k: v for k, v in merged.items() if k not in choices or k in above}
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(old, value, f"{at}.{key}".strip("."))
        else:
            merged[key] = value
    return merged


def _key(spec: dataclasses.Field[Any]) -> str:
    return spec.metadata.get("key", spec.name)


def _section(name: str, kind: Any, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    fields = {_key(f): f for f in dataclasses.fields(kind)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise _unknown(f"{name}.{key}", [f"{name}.{k}" for k in fields], "key")
        spec = fields[key]
        arguments[spec.name] = _typed(value, hints[spec.name], f"{name}.{key}")
    return kind(**arguments)


def _unknown(name: str, known: Sequence[str], what: str) -> UserError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown {what} {name}", hint=hint)


def _typed(value: Any, kind: Any, name: str) -> Any:
    """``value`` as ``kind``, or ``UserError``. An int is a fine float; a bool is not an int."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            near = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
            also = f"did you mean {near[0]}? " if near else ""
            allowed = ", ".join(str(choice) for choice in choices)
            raise UserError(f"{name}={value!r} is not allowed", hint=f"{also}allowed: {allowed}")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
        return _typed(value, kind, name)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        element = typing.get_args(kind)[0]
        return tuple(_typed(item, element, name) for item in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = Mapping if origin is not None else kind
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        wanted = "table" if origin is not None else kind.__name__
        raise UserError(f"{name}={value!r} is not of type {wanted}")
    return value
