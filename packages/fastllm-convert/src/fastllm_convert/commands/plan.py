"""``fastllm-convert plan``: a dry run."""

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
    say,
    source_options,
    target_options,
    write_options,
)


@click.command()
@path_argument("src")
@target_options
@source_options
@json_option
def plan(
    src: Path,
    as_json: bool,
    **given: Any,
) -> None:
    """Say what converting SRC would read and write, and write nothing.

    \b
    Example:
      fastllm-convert plan checkpoints/llama-70b --to hf --dtype bf16

    Everything that `run` checks before writing is checked, CRCs excepted.
    """
    from fastllm_convert.conversion import make_plan, read_source
    from fastllm_convert.engine.execute import default_threads, memory_bound

    source = read_source(src, read_options(given))
    say(f"source: {source.summary}")
    made = make_plan(source, write_options(given))
    bound = memory_bound(default_threads())
    result = {
        "source": {"path": str(src), "format": source.format, "summary": source.summary},
        "family": source.spec.family,
        "target": given["target"],
        "bytes_read": made.bytes_read,
        "bytes_written": made.bytes_written,
        "tensors": made.tensors,
        "peak_memory_bytes": bound,
        "files": [{"path": f.path, "bytes": f.size, "tensors": len(f.pieces)} for f in made.files],
        "notes": list(made.notes),
    }
    lines = [
        f"read    {human_bytes(made.bytes_read)} of {len(made.sources)} files",
        f"write   {human_bytes(made.bytes_written)}: {made.tensors} tensors",
        f"memory  at most {human_bytes(bound)} of buffers, whatever the model's size",
        *(f"  {human_bytes(f.size):>10}  {f.path}" for f in made.files),
        *(f"note: {note}" for note in made.notes),
    ]
    emit(result, as_json, "\n".join(lines))
