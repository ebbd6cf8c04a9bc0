"""``fastllm-convert run``."""

from __future__ import annotations

import time
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
@path_argument("dst")
@target_options
@source_options
@click.option("--force", is_flag=True, help="Replace DST when it is a converted checkpoint.")
@click.option("--no-crc", is_flag=True, help="Do not check the CRC-32 of torch files.")
@click.option("--fsync", is_flag=True, help="Wait until the disk has DST (power may fail then).")
@click.option("--threads", type=click.IntRange(1, 64), help="Copying threads [cores, at most 8].")
@json_option
def run(src: Path, dst: Path, **given: Any) -> None:
    """Convert the checkpoint SRC into the new folder DST.

    \b
    Example:
      fastllm-convert run runs/quickstart/train/checkpoints my-model --to hf

    DST appears complete or not at all. A run that was killed continues when started again.
    """
    convert(src, dst, **given)


def convert(
    src: Path,
    dst: Path,
    *,
    force: bool,
    no_crc: bool,
    fsync: bool,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """``run``, as a function of its options (the aliases call it too)."""
    from fastllm_convert.conversion import make_plan, read_source
    from fastllm_convert.engine.execute import default_threads, execute, progress_bar
    from fastllm_convert.engine.publish import require_free

    started = time.monotonic()
    source = read_source(src, read_options(given))
    say(f"source: {source.summary}")
    plan = make_plan(source, write_options(given))
    for note in plan.notes:
        say(f"note: {note}")
    require_free(src, dst, force=force)
    advance, close = progress_bar(plan.bytes_written, f"writing {dst.name}")
    try:
        overflowed = execute(
            plan,
            dst,
            threads=threads or default_threads(),
            check_crc=not no_crc,
            progress=advance,
            replace=force,
            durable=fsync,
        )
    finally:
        close()
    seconds = time.monotonic() - started
    if overflowed:
        say(f"warning: {overflowed} finite values became infinite in {given['dtype']}")
    result = {
        "source": {"path": str(src), "format": source.format, "summary": source.summary},
        "family": source.spec.family,
        "target": {
            "path": str(dst),
            "format": given["target"],
            "files": [f.path for f in plan.files],
        },
        "tensors": plan.tensors,
        "bytes": plan.bytes_written,
        "seconds": round(seconds, 3),
        "overflowed": overflowed,
        "notes": list(plan.notes),
    }
    emit(
        result,
        as_json,
        f"{dst}: {plan.tensors} tensors, {human_bytes(plan.bytes_written)} in {seconds:.1f} s",
    )
    say(f"next: fastllm-convert inspect {dst}")
