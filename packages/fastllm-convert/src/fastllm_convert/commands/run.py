"""``fastllm-convert run``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import click

from fastllm_convert.commands.options import (
    emit,
    human_bytes,
    json_option,
    parse_bytes,
    path_argument,
    say,
    source_options,
    target_options,
)


@click.command()
@path_argument("src")
@path_argument("dst")
@target_options
@source_options
@click.option("--force", is_flag=True, help="Replace DST when it is a converted checkpoint.")
@click.option("--no-crc", is_flag=True, help="Do not check the CRC-32 of torch files.")
@click.option("--threads", type=click.IntRange(1, 64), help="Copying threads [cores, at most 8].")
@json_option
def run(
    src: Path,
    dst: Path,
    target: str,
    dtype: str | None,
    shard_size: str,
    source_format: str | None,
    config: Path | None,
    weights: Literal["model", "master"],
    force: bool,
    no_crc: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Convert the checkpoint SRC into the new folder DST.

    \b
    Example:
      fastllm-convert run runs/quickstart/train/checkpoints my-model --to hf

    DST appears complete or not at all. A run that was killed continues when started again.
    """
    from fastllm_convert.conversion import SourceOptions, TargetOptions, make_plan, read_source
    from fastllm_convert.engine.execute import default_threads, execute, progress_bar
    from fastllm_convert.engine.publish import require_free

    started = time.monotonic()
    source = read_source(src, SourceOptions(source_format, config, weights))
    say(f"source: {source.summary}")
    plan = make_plan(source, TargetOptions(target, dtype, parse_bytes(shard_size)))
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
        )
    finally:
        close()
    seconds = time.monotonic() - started
    if overflowed:
        say(f"warning: {overflowed} finite values became infinite in {dtype}")
    result = {
        "source": {"path": str(src), "format": source.format, "summary": source.summary},
        "family": source.spec.family,
        "target": {"path": str(dst), "format": target, "files": [f.path for f in plan.files]},
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
