"""``fastllm-convert inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastllm_convert.commands.options import (
    emit,
    human_bytes,
    json_option,
    path_argument,
    read_options,
    source_options,
)


@click.command()
@path_argument("src")
@source_options
@click.option("--tensors", "list_tensors", is_flag=True, help="List every tensor.")
@json_option
def inspect(
    src: Path,
    list_tensors: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Say what the checkpoint SRC holds, checked against its architecture.

    \b
    Example:
      fastllm-convert inspect my-model-hf --tensors
    """
    from fastllm_convert.conversion import read_source
    from fastllm_convert.engine.plan import sources_of
    from fastllm_planner.arch import count_params, spec_to_dict

    source = read_source(src, read_options(given))
    spec = source.spec
    files = sources_of(list(source.tensors.values()))
    types: dict[str, int] = {}
    for array in source.tensors.values():
        types[array.dtype.code] = types.get(array.dtype.code, 0) + array.numel
    size = sum(a.nbytes for a in source.tensors.values())
    result = {
        "path": str(src),
        "format": source.format,
        "summary": source.summary,
        "arch": spec_to_dict(spec),
        "parameters": count_params(spec),
        "bytes": size,
        "elements_by_dtype": types,
        "files": [{"path": str(f.path), "bytes": f.size} for f in files],
        "tensors": {
            name: {"shape": list(a.shape), "dtype": a.dtype.code}
            for name, a in source.tensors.items()
        },
    }
    stored = ", ".join(f"{n:,} {code}" for code, n in types.items())
    lines = [
        source.summary,
        f"parameters  {count_params(spec):,} in {len(source.tensors)} tensors, as the config says",
        f"stored      {human_bytes(size)} in {len(files)} files: {stored}",
        f"shape       {spec.layers} layers, hidden {spec.hidden}, "
        f"heads {spec.heads}/{spec.kv_heads} of {spec.head_dim}, vocabulary {spec.vocab:,}",
    ]
    if list_tensors:
        lines += [
            f"  {a.dtype.code:<5} {list(a.shape)!s:<18} {n}" for n, a in source.tensors.items()
        ]
    emit(result, as_json, "\n".join(lines))
