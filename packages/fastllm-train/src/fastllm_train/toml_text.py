"""Nested tables → TOML text (the standard library only reads TOML)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML 1.0 text that ``tomllib.loads`` turns back into an equal table, less None values."""
    lines: list[str] = []
    _write(table, (), lines)
    return "\n".join(lines).strip("\n") + "\n"


def _write(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    scalars = {k: v for k, v in table.items() if not isinstance(v, Mapping) and v is not None}
    if path and (scalars or not table):
        lines.append(f"\n[{'.'.join(_key(part) for part in path)}]")
    lines.extend(f"{_key(key)} = {_value(value)}" for key, value in scalars.items())
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write(value, (*path, key), lines)


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "").replace("-", "").isalnum()
    return key if bare else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"TOML has no {type(value).__name__}")


def _string(text: str) -> str:
    # TOML's basic strings take JSON's escapes, all but the surrogate pairs of non-BMP text.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
