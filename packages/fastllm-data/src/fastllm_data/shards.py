"""A job in parts that any machine can do, and their joining: byte for byte what one run writes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastllm_data.errors import UserError
from fastllm_data.inputs import Source, find_sources
from fastllm_data.merge import merge
from fastllm_data.options import Summary, TokenizeOptions
from fastllm_data.output import read_sidecar, targets_of, write_json
from fastllm_data.tokenize import LISTS, job_of, tokenize
from fastllm_data.tokenizer import Tokenizer, load_tokenizer

RunShards = Callable[[TokenizeOptions, list[int], list[list[Source]]], None]


def shards_folder(out: Path) -> Path:
    return out.with_name(out.name + ".shards")


def shard_out(out: Path, shard: int, shards: int) -> Path:
    return shards_folder(out) / f"{shard:05d}-of-{shards:05d}"


def plan_shards(sources: Sequence[Source], shards: int) -> list[list[Source]]:
    """Contiguous parts of about equal bytes; plain files of lines are cut anywhere, others not.

    Raises UserError for inputs that can be read only once.
    """
    for source in sources:
        if source.kind in ("stdin", "pipe"):
            raise UserError(f"{source.name} cannot be read in shards", "write it to a file first")
    total = sum(source.size for source in sources)
    plan: list[list[Source]] = [[] for _ in range(shards)]
    before = 0
    for source in sources:
        if source.divisible and source.size > 0:
            for shard in range(before * shards // total, shards):
                begin = max(0, -(-total * shard // shards) - before)
                end = min(source.size, -(-total * (shard + 1) // shards) - before)
                if begin >= source.size:
                    break
                if begin < end:
                    whole = (begin, end) == (0, source.size)
                    part = source if whole else replace(source, begin=begin, end=end)
                    plan[shard].append(part)
        else:
            # All of it where its middle falls: sizes may be unknown, so anything is in range.
            middle = before + source.size // 2
            plan[min(shards - 1, middle * shards // max(1, total))].append(source)
        before += source.size
    return plan


def run_shard(
    options: TokenizeOptions, shard: int, shards: int, sources: list[Source] | None = None
) -> Summary:
    """Do one part, or what is left of it; one that is complete is left alone.

    sources: those of this part; None: to be found.
    """
    if sources is None:
        sources = plan_shards(find_sources(options.inputs, options.form), shards)[shard]
    part = _shard_options(options, shard, shards)
    done = _finished(part, sources)
    return tokenize(part, sources) if done is None else done


def tokenize_in_shards(options: TokenizeOptions, shards: int, run: RunShards) -> Summary:
    """Do the parts that are not complete by ``run``, then join them.

    With ``options.resume`` parts of an earlier run are taken. Raises UserError.
    """
    started = time.perf_counter()
    options.check()
    sources = find_sources(options.inputs, options.form)
    plan = plan_shards(sources, shards)
    tokenizer = _tokenizer(options)
    prepare(options)
    missing = [
        shard
        for shard in range(shards)
        if _finished(_shard_options(options, shard, shards), plan[shard], tokenizer) is None
    ]
    if missing:
        run(options, missing, plan)
    return _join(options, tokenizer, sources, plan, started)


def run_here(options: TokenizeOptions, missing: list[int], plan: list[list[Source]]) -> None:
    """One part after another in this process."""
    for shard in missing:
        run_shard(options, shard, len(plan), plan[shard])


def prepare(options: TokenizeOptions) -> None:
    """Check that the output may be written, and clear away or keep what an earlier run left."""
    folder = shards_folder(options.out)
    for target in targets_of(options.out, options.keys, options.level):
        if target.exists() and not options.force and not (options.resume and folder.exists()):
            raise UserError(f"{target.prefix} exists", "--force replaces it")
    if folder.exists() and not options.resume:
        if not options.force:
            raise UserError(
                f"{folder} exists: a run is writing it, or was stopped",
                "--resume goes on with it, --force starts again",
            )
        shutil.rmtree(folder)


def _tokenizer(options: TokenizeOptions) -> Tokenizer:
    return load_tokenizer(
        options.tokenizer, merges=options.merges, parse_special=options.parse_special
    )


def _shard_options(options: TokenizeOptions, shard: int, shards: int) -> TokenizeOptions:
    return replace(options, out=shard_out(options.out, shard, shards), force=False, resume=True)


def _finished(
    part: TokenizeOptions, sources: list[Source], tokenizer: Tokenizer | None = None
) -> Summary | None:
    """What a complete part holds; None if it is to be done. Raises UserError for another job's."""
    targets = targets_of(part.out, part.keys, part.level)
    if not all(target.file(".idx").exists() for target in targets):
        return None
    meta = read_sidecar(targets[0].prefix)
    job = job_of(part, tokenizer or _tokenizer(part), sources)
    if meta is None or meta.get("job") != job:
        raise UserError(
            f"{part.out} is of a run with other arguments or inputs",
            "resume with the same ones, or start again with --force",
        )
    errors = part.out.with_name(f"{part.out.name}.{LISTS[0]}")
    return Summary(
        prefixes=[str(target.prefix) for target in targets],
        encoder=str(meta["encoder"]),
        verified_samples=int(meta["verified_samples"]),
        seconds=0.0,
        counts=dict(meta["counts"]),
        errors_file=str(errors) if errors.exists() else None,
    )


def _join(
    options: TokenizeOptions,
    tokenizer: Tokenizer,
    sources: list[Source],
    plan: list[list[Source]],
    started: float,
) -> Summary:
    shards = len(plan)
    parts = [_shard_options(options, shard, shards) for shard in range(shards)]
    done: list[Summary] = []
    for part, part_sources in zip(parts, plan, strict=True):
        summary = _finished(part, part_sources, tokenizer)
        if summary is None:
            raise UserError(f"{part.out}: this shard was not completed", "run again with --resume")
        done.append(summary)
    targets = targets_of(options.out, options.keys, options.level)
    for number, target in enumerate(targets):
        prefixes = [Path(summary.prefixes[number]) for summary in done]
        merge(prefixes, target.prefix, force=True)
        # Of the whole job, as one run would have written it.
        meta = read_sidecar(target.prefix)
        assert meta is not None, "every shard has a sidecar, so their joining does"
        meta["job"] = job_of(options, tokenizer, sources)
        meta["inputs"] = [source.describe() for source in sources]
        meta["shards"] = shards
        del meta["merged"]
        write_json(target.file(".meta.json"), meta)
    listed = _join_lists(options.out, [part.out for part in parts])
    counts: dict[str, int] = {}
    for summary in done:
        counts = {n: c + counts.get(n, 0) for n, c in summary.counts.items()}
    shutil.rmtree(shards_folder(options.out), ignore_errors=True)
    return Summary(
        prefixes=[str(target.prefix) for target in targets],
        encoder=" and ".join(sorted({summary.encoder for summary in done})),
        verified_samples=sum(summary.verified_samples for summary in done),
        seconds=time.perf_counter() - started,
        counts=counts,
        errors_file=listed,
    )


def _join_lists(out: Path, parts: list[Path]) -> str | None:
    for name in LISTS:
        final = out.with_name(f"{out.name}.{name}")
        found = [p for part in parts if (p := part.with_name(f"{part.name}.{name}")).exists()]
        if not found:
            final.unlink(missing_ok=True)
            continue
        with final.open("wb") as file:
            for path in found:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, file)
    first = out.with_name(f"{out.name}.{LISTS[0]}")
    return str(first) if first.exists() else None
