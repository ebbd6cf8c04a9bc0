"""Named sizes: one TOML file per family beside this file, read by name."""

from __future__ import annotations

import difflib
import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from fastllm_planner.arch.spec import ArchError, ArchSpec, spec_from_dict


@cache
def _tables() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(files(__name__).iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            raw = tomllib.loads(entry.read_text(encoding="utf-8"))
            defaults = raw.pop("defaults", {})
            found.update({name: {**defaults, **table} for name, table in raw.items()})
    return found


def preset_names() -> list[str]:
    """Every preset, in file order."""
    return list(_tables())


def preset(name: str) -> ArchSpec:
    """The spec of a named size (case-insensitive). ``ArchError`` names the nearest known one."""
    table = _tables().get(name.lower())
    if table is None:
        near = difflib.get_close_matches(name.lower(), preset_names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(preset_names())}"
        raise ArchError(f"unknown model {name!r}", hint=hint)
    return spec_from_dict(table)
