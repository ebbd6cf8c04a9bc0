"""From text to datasets: choose the encoder, run the builder, publish the result."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from fastllm_core import DatasetBuilder, Encoder, InputError, set_mmap_threshold
from fastllm_data import __version__
from fastllm_data.checkpoint import (
    STATE_FILE,
    BadLines,
    Checkpoint,
    load_checkpoint,
    lock_folder,
)
from fastllm_data.documents import SplitText, sentence_splitter
from fastllm_data.encoder_choice import (
    EncoderDiffersError,
    SampleCheck,
    choose_encoder,
    compare_texts,
    reference_encoder,
)
from fastllm_data.errors import UserError
from fastllm_data.feed import add_source, sample_texts
from fastllm_data.growing_digest import GrowingDigest
from fastllm_data.inputs import Source, find_sources
from fastllm_data.options import Summary, TokenizeOptions
from fastllm_data.output import (
    Target,
    empty_folder,
    open_work_folder,
    sha256_file,
    targets_of,
    write_json,
)
from fastllm_data.places import Places
from fastllm_data.progress import Progress
from fastllm_data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Summary", "TokenizeOptions", "choose_encoder", "job_of", "tokenize"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HUGE_BLOCK = 2 << 20  # bytes; a line that is larger must not make the heap grow for good
LISTS = ("errors.txt", "quarantine")  # beside the output, if there were bad lines


def tokenize(options: TokenizeOptions, sources: list[Source] | None = None) -> Summary:
    """Run the whole job. Raises UserError; then nothing is left under the output's names.

    sources: what to read; None: what ``options.inputs`` name.
    """
    options.check()
    set_mmap_threshold(HUGE_BLOCK)
    if sources is None:
        sources = find_sources(options.inputs, options.form)
    tokenizer = load_tokenizer(
        options.tokenizer, merges=options.merges, parse_special=options.parse_special
    )
    _check_ids(options, tokenizer)
    targets = targets_of(options.out, options.keys, options.level)
    work = open_work_folder(options.out, targets, force=options.force, resume=options.resume)
    with lock_folder(work):
        if not options.resume:
            empty_folder(work)
        at = load_checkpoint(work, _fingerprint(options, tokenizer, sources))
        try:
            summary = _run(options, tokenizer, sources, targets, at)
        except InputError as error:
            raise _stopped(str(error), work, bad_line=True) from error
        except (OSError, KeyboardInterrupt) as error:
            # A full disk, a lost connection or a job's time limit: what is done can be kept.
            if isinstance(error, KeyboardInterrupt):
                if (work / STATE_FILE).exists():
                    print("note: --resume goes on from the last checkpoint", file=sys.stderr)
                else:
                    shutil.rmtree(work, ignore_errors=True)
                raise
            name = error.filename or options.out
            full = "free some space first" if error.errno in FULL else ""
            raise _stopped(f"{name}: {error.strerror or error}", work, advice=full) from error
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    return summary


def _stopped(message: str, work: Path, *, bad_line: bool = False, advice: str = "") -> UserError:
    """The error that ends a run; its work is kept if there is a checkpoint to go on from."""
    kept = (work / STATE_FILE).exists()
    if not kept:
        shutil.rmtree(work, ignore_errors=True)
    hints = [advice] if advice else []
    if bad_line and re.search(r":\d+: ", message):
        hints.append(
            "--resume with --on-error skip or quarantine goes on from the last checkpoint"
            if kept
            else "--on-error skip or quarantine goes on past bad lines"
        )
    elif kept:
        hints.append("--resume goes on from the last checkpoint")
    return UserError(message, "; ".join(hints))


def _fingerprint(
    options: TokenizeOptions, tokenizer: Tokenizer, sources: list[Source]
) -> dict[str, Any]:
    identity = json.dumps([source.identity() for source in sources]).encode()
    return {
        "tokenizer": tokenizer.sha256,
        "options": options.deciding(),
        "inputs": hashlib.sha256(identity).hexdigest(),
    }


def job_of(options: TokenizeOptions, tokenizer: Tokenizer, sources: list[Source]) -> str:
    """A hash of all that decides the output; equal jobs write equal files."""
    content = json.dumps(_fingerprint(options, tokenizer, sources), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _run(
    options: TokenizeOptions,
    tokenizer: Tokenizer,
    sources: list[Source],
    targets: list[Target],
    at: Checkpoint,
) -> Summary:
    started = time.perf_counter()
    work = targets[0].work
    name, verified = str(at.fingerprint.get("encoder", "")), 0
    if at.stage == "build":
        digests, name, verified = _build_checked(options, tokenizer, sources, targets, at)
        for target, digest, position in zip(targets, digests, at.positions or [], strict=True):
            tokens, sequences, documents = position
            made = {
                "encoder": name,
                "verified_samples": verified,
                "dataset": {"documents": documents, "sequences": sequences, "tokens": tokens},
                "digest": digest,
            }
            _write_sidecar(target, options, tokenizer, sources, at, made)
        at.stage = "publish"
        at.fingerprint["encoder"] = name
        at.save(work)
    listed = _publish_lists(work, options.out, at)
    for target in targets:
        target.publish()
    return Summary(
        prefixes=[str(target.prefix) for target in targets],
        encoder=name,
        verified_samples=verified,
        seconds=time.perf_counter() - started,
        counts=at.counts,
        errors_file=listed,
    )


def _publish_lists(work: Path, out: Path, at: Checkpoint) -> str | None:
    """Move the lists of bad lines to their places; those of an older run go."""
    for name in LISTS:
        final = out.with_name(f"{out.name}.{name}")
        if (work / name).exists():
            (work / name).replace(final)
        elif name not in at.sizes:
            final.unlink(missing_ok=True)
    return str(out.with_name(f"{out.name}.{LISTS[0]}")) if LISTS[0] in at.sizes else None


def _check_ids(options: TokenizeOptions, tokenizer: Tokenizer) -> None:
    if (options.append_eod or options.empty_doc == "eod") and tokenizer.eod_id is None:
        raise UserError(f"tokenizer {tokenizer.path} has no end-of-document token")
    if options.add_bos and tokenizer.bos_id is None:
        raise UserError(f"tokenizer {tokenizer.path} has no BOS token")


def _build_checked(
    options: TokenizeOptions,
    tokenizer: Tokenizer,
    sources: list[Source],
    targets: list[Target],
    at: Checkpoint,
) -> tuple[list[str], str, int]:
    """Build with the fast encoder; again with the reference library if their ids differ.

    Returns the digest of each target's .bin, the encoder's name, and how many texts were compared.
    """
    split = None
    if options.split_sentences is not None:
        split = sentence_splitter(options.split_sentences, options.keep_newlines)
    encoder, name = choose_encoder(options, tokenizer)
    if name == "fast":
        try:
            with SampleCheck(partial(compare_texts, encoder, tokenizer)) as check:
                digests = _build(options, tokenizer, encoder, sources, targets, at, split, check)
                return digests, name, check.wait()
        except EncoderDiffersError as error:
            print(f"warning: {error}; using the reference library", file=sys.stderr)
        encoder, name = reference_encoder(tokenizer), "reference"
    return _build(options, tokenizer, encoder, sources, targets, at, split), name, 0


def _build(
    options: TokenizeOptions,
    tokenizer: Tokenizer,
    encoder: Encoder,
    sources: list[Source],
    targets: list[Target],
    at: Checkpoint,
    split: SplitText | None,
    check: SampleCheck | None = None,
) -> list[str]:
    """Write .bin and .idx of all targets into their work folder, from the checkpoint on.

    Returns the digest of each .bin. check: must end well before anything is kept.
    """
    work = targets[0].work
    before = dict(at.counts)
    places = Places()
    bad = BadLines(work, keep=options.on_error == "quarantine", sizes=at.sizes)
    source = Source("", "plain", 0)  # the one being read

    def on_bad_line(_: str, line: int, message: str, raw: bytes) -> None:
        said = bad.add(*places.of(source, line), message, raw)
        if bad.count <= BadLines.SHOWN:
            progress.say(f"warning: {said}")

    def on_written(counts: dict[str, int]) -> None:
        if check is not None:
            check.poll()
        progress.update(counts)

    progress = Progress(sum(s.stop - s.begin for s in sources))
    lines_are_texts = split is None and all(s.format == "text-line" for s in sources)
    builder = DatasetBuilder(
        encoder,
        keys=list(options.keys),
        targets=[(str(t.work_file(".bin")), str(t.work_file(".idx"))) for t in targets],
        format="text" if lines_are_texts and sources else "json",
        eod_id=tokenizer.eod_id,
        bos_id=tokenizer.bos_id if options.add_bos else None,
        append_eod=options.append_eod,
        empty_document=options.empty_doc,
        int32=tokenizer.int32,
        stop_on_error=options.on_error == "stop",
        workers=options.workers,
        resume_at=at.positions,
        on_bad_line=on_bad_line,
        on_written=on_written,
    )

    def save(source: int, offset: int, line: int) -> None:
        if check is not None:
            check.wait()
        at.reach(source, offset, line)
        now = builder.counts()
        at.counts = {name: n + before.get(name, 0) for name, n in now.items()}
        at.positions, at.sizes = builder.sync(), bad.sync()
        at.save(work)

    saved = 0
    step = options.checkpoint_bytes
    with progress, bad, ExitStack() as stack:
        hashing = [stack.enter_context(GrowingDigest(t.work_file(".bin"))) for t in targets]
        progress.pass_over(sum(s.stop - s.begin for s in sources[: at.source]))
        for i in range(at.source, len(sources)):
            source = sources[i]
            start = (at.offset, at.line) if i == at.source else (0, 0)
            try:
                added = add_source(
                    builder,
                    source,
                    options.keys,
                    start,
                    step,
                    progress.meter,
                    split,
                    _sampling(check, options, source, split),
                )
                for reached in added:
                    if builder.counts()["input_bytes"] - saved >= step // 2:
                        saved = builder.counts()["input_bytes"]
                        save(i, *reached)
            except InputError as error:
                raise InputError(_located(str(error), source, places)) from error
        positions = builder.finish()
        if check is not None:
            check.wait()
        at.positions = positions
        digests = [digest.finish() for digest in hashing]
        at.counts = {n: c + before.get(n, 0) for n, c in builder.counts().items()}
        at.sizes = bad.sync()
    if bad.count > BadLines.SHOWN:
        where = f"see {options.out}.errors.txt"
        print(f"warning: {bad.count} bad lines in all; {where}", file=sys.stderr)
    return digests


def _sampling(
    check: SampleCheck | None, options: TokenizeOptions, source: Source, split: SplitText | None
) -> Callable[[bytes], None] | None:
    """Have samples of an input compared: spread over it if it can be read twice, else its first
    texts, by what is returned, when they pass."""
    count = options.verify_sample
    if check is None or not count:
        return None
    if source.divisible:
        check.submit(source.name, partial(sample_texts, source, options.keys, count))
        return None
    form = "jsonl" if split is not None else source.format
    return check.tap(source, options.keys, count, form)


def _located(message: str, source: Source, places: Places) -> str:
    """The builder's ``SOURCE:LINE: …`` with the file and line that a user knows."""
    found = re.fullmatch(re.escape(source.name) + r":(\d+): (.*)", message, re.DOTALL)
    if found is None:
        return message
    name, line = places.of(source, int(found[1]))
    return f"{name}:{line}: {found[2]}"


def _write_sidecar(
    target: Target,
    options: TokenizeOptions,
    tokenizer: Tokenizer,
    sources: list[Source],
    at: Checkpoint,
    made: dict[str, Any],
) -> None:
    """made: what is known of this target only, or of how it was made."""
    content: dict[str, Any] = {
        "schema": 1,
        "made_by": f"fastllm-data {__version__}",
        "job": job_of(options, tokenizer, sources),
        "tokenizer": tokenizer.describe(),
        "options": options.recorded(),
        "encoder": made["encoder"],
        "verified_samples": made["verified_samples"],
        "dtype": "int32" if tokenizer.int32 else "uint16",
        "inputs": [_described(source, options.hash_inputs) for source in sources],
        "counts": at.counts,
        "dataset": made["dataset"],
        "sha256": {"bin": made["digest"], "idx": sha256_file(target.work_file(".idx"))},
    }
    write_json(target.work_file(".meta.json"), content)


def _described(source: Source, with_hash: bool) -> dict[str, Any]:
    said = source.describe()
    if with_hash and not source.remote and source.kind in ("plain", "gz", "zst"):
        said["sha256"] = sha256_file(Path(source.name))
    return said
