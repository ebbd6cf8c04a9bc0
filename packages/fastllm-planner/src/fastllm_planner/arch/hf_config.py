"""Hugging Face ``config.json`` ↔ ``ArchSpec``, for every family under ``arch/families``.

Configs come from elsewhere: they are parsed as plain JSON, never instantiated by transformers.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fastllm_planner.arch import families
from fastllm_planner.arch.spec import ArchError, ArchSpec, as_table

MAX_CONFIG_BYTES = 16 << 20


@cache
def family_modules() -> dict[str, ModuleType]:
    """Family name → its module. A file added under ``families/`` is found without registration."""
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(families.__path__):
        module = importlib.import_module(f"{families.__name__}.{info.name}")
        found[module.FAMILY] = module
    return found


def from_hf_config(config: Mapping[str, Any]) -> ArchSpec:
    """Parsed ``config.json`` → spec. Raises ``ArchError`` for an unknown or incomplete one."""
    model_type = config.get("model_type")
    for module in family_modules().values():
        if model_type in module.MODEL_TYPES:
            spec: ArchSpec = module.from_hf(config)
            return spec
    known = sorted(t for m in family_modules().values() for t in m.MODEL_TYPES)
    raise ArchError(
        f"config.json: model_type {model_type!r} is not supported",
        hint=f"supported: {', '.join(known)}",
    )


def read_hf_config(path: Path) -> ArchSpec:
    """A ``config.json`` file (or a folder that holds one) → spec."""
    file = path / "config.json" if path.is_dir() else path
    try:
        size = file.stat().st_size
        text = file.read_bytes() if size <= MAX_CONFIG_BYTES else None
    except OSError as error:
        raise ArchError(f"cannot read {file}: {error.strerror}") from error
    if text is None:
        raise ArchError(f"{file} is larger than any config.json ({MAX_CONFIG_BYTES} bytes)")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchError(f"{file} is not JSON: {error}") from error
    config = as_table(raw)
    if config is None:
        raise ArchError(f"{file} is not a JSON object")
    return from_hf_config(config)


# Fields that change neither a tensor nor the forward pass: a config may lack them.
_INCIDENTAL = ("init_std", "bos_token_id", "eos_token_id")


def to_hf_config(spec: ArchSpec, *, dtype: str | None = None) -> dict[str, Any]:
    """Spec → ``config.json`` that transformers 4 and 5 both read right.

    ``dtype``: ``float32``, ``bfloat16`` or ``float16`` of the stored weights, when known. Raises
    ``ArchError`` where the family's config cannot say what the spec says.
    """
    module = family_modules().get(spec.family)
    if module is None:
        raise ArchError(f"family {spec.family!r} has no Hugging Face config")
    config: dict[str, Any] = dict(module.to_hf(spec))
    lost = _lost_fields(spec, module.from_hf(config))
    if lost:
        raise ArchError(
            f"a Hugging Face config of family {spec.family!r} cannot express {', '.join(lost)}",
            hint="another family may: see 'fastllm-planner models'",
        )
    if dtype is not None:
        config["torch_dtype"] = config["dtype"] = dtype
    return config


def _lost_fields(spec: ArchSpec, back: ArchSpec) -> list[str]:
    """Fields that matter and do not survive the way to a config and back."""
    idle: set[str] = set(_INCIDENTAL)
    if spec.mla is not None:
        idle |= {"head_dim", "kv_heads"}  # the latent's own sizes replace them
    if spec.moe is not None and not spec.moe.first_dense_layers:
        idle.add("ffn_hidden")  # no layer has a dense MLP
    if spec.position != "rope":
        idle.add("rope")
    return [
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in fields(spec)
        if field.name not in idle and getattr(spec, field.name) != getattr(back, field.name)
    ]
