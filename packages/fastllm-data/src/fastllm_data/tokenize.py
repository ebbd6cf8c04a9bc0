"""From text to datasets: choose the encoder, run the builder, publish the result."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm_core import DatasetBuilder, Encoder, InputError, python_encoder
from fastllm_data import __version__
from fastllm_data.checkpoint import (
    STATE_FILE,
    BadLines,
    Checkpoint,
    load_checkpoint,
    lock_folder,
)
from fastllm_data.errors import UserError
from fastllm_data.inputs import Source, add_source, find_sources, sample_texts
from fastllm_data.output import (
    Target,
    empty_folder,
    open_work_folder,
    sha256_file,
    targets_of,
    write_json,
)
from fastllm_data.progress import Progress
from fastllm_data.tokenizer import Tokenizer, load_tokenizer

CHECKPOINT_BYTES = 256 << 20  # of input: some seconds of work


@dataclass(frozen=True)
class TokenizeOptions:
    """What to read, with which tokenizer, to where, and how."""

    inputs: tuple[str, ...]
    tokenizer: Path
    out: Path
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    add_bos: bool = False
    merges: Path | None = None
    parse_special: bool | None = None
    empty_doc: str = "boundary"
    on_error: str = "stop"
    workers: int = 1
    verify_sample: int = 32
    reference_only: bool = False
    force: bool = False
    resume: bool = False
    checkpoint_bytes: int = CHECKPOINT_BYTES

    def recorded(self) -> dict[str, Any]:
        """The switches that decide the bytes of the output."""
        return {
            "keys": list(self.keys),
            "append_eod": self.append_eod,
            "add_bos": self.add_bos,
            "parse_special": self.parse_special,
            "empty_doc": self.empty_doc,
            "on_error": self.on_error,
        }


@dataclass
class Summary:
    """What a run did."""

    prefixes: list[str]
    encoder: str
    verified_samples: int
    seconds: float
    counts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        mb = self.counts["text_bytes"] / 1e6
        return {
            "outputs": self.prefixes,
            **self.counts,
            "tokens_per_byte": self.counts["tokens"] / max(1, self.counts["text_bytes"]),
            "encoder": self.encoder,
            "verified_samples": self.verified_samples,
            "seconds": round(self.seconds, 3),
            "mb_per_second": round(mb / max(self.seconds, 1e-9), 2),
        }

    def to_text(self) -> str:
        d = self.to_dict()
        rows = [
            ("documents", f"{d['documents']:,} ({d['empty_documents']:,} empty)"),
            ("tokens", f"{d['tokens']:,} ({d['tokens_per_byte']:.3f} a byte)"),
            ("dropped lines", f"{d['bad_lines']:,}"),
            ("encoder", f"{d['encoder']}, {d['verified_samples']} texts compared"),
            ("time", f"{d['seconds']:.2f} s, {d['mb_per_second']:.1f} MB of text a second"),
        ]
        rows += [("wrote", f"{prefix}.bin, .idx, .meta.json") for prefix in self.prefixes]
        lines = [f"{name:14}{value}" for name, value in rows]
        return "\n".join([*lines, f"next: fastllm-data stats {self.prefixes[0]}"])


def tokenize(options: TokenizeOptions) -> Summary:
    """Run the whole job. Raises UserError; then nothing is left under the output's names."""
    repeated = [key for key, count in Counter(options.keys).items() if count > 1]
    if repeated:
        raise UserError(f"key {repeated[0]!r} is given twice")
    sources = find_sources(options.inputs)
    tokenizer = load_tokenizer(
        options.tokenizer, merges=options.merges, parse_special=options.parse_special
    )
    _check_ids(options, tokenizer)
    targets = targets_of(options.out, options.keys)
    work = open_work_folder(options.out, targets, force=options.force, resume=options.resume)
    with lock_folder(work):
        if not options.resume:
            empty_folder(work)
        at = load_checkpoint(work, _fingerprint(options, tokenizer, sources))
        try:
            summary = _run(options, tokenizer, sources, targets, at)
        except InputError as error:
            shutil.rmtree(work, ignore_errors=True)
            hint = "--on-error skip or quarantine goes on past bad lines"
            raise UserError(str(error), hint if re.search(r":\d+: ", str(error)) else "") from error
        except (OSError, KeyboardInterrupt) as error:
            # A full disk or a job's time limit: what is done can be kept.
            kept = (work / STATE_FILE).exists()
            if not kept:
                shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, KeyboardInterrupt):
                raise
            name = error.filename or options.out
            raise UserError(
                f"{name}: {error.strerror or error}", "--resume goes on from here" if kept else ""
            ) from error
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    return summary


def _fingerprint(
    options: TokenizeOptions, tokenizer: Tokenizer, sources: list[Source]
) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer.sha256,
        "options": options.recorded(),
        "inputs": [source.describe() for source in sources],
    }


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
        encoder, name, verified = choose_encoder(options, tokenizer, sources)
        _build(options, tokenizer, encoder, sources, targets, at)
        for target in targets:
            _write_sidecar(target, options, tokenizer, sources, at.counts, name)
        at.stage = "publish"
        at.fingerprint["encoder"] = name
        at.save(work)
    for suffix in ("errors.txt", "quarantine"):
        if (work / suffix).exists():
            (work / suffix).replace(options.out.with_name(f"{options.out.name}.{suffix}"))
    for target in targets:
        target.publish()
    return Summary(
        prefixes=[str(target.prefix) for target in targets],
        encoder=name,
        verified_samples=verified,
        seconds=time.perf_counter() - started,
        counts=at.counts,
    )


def _check_ids(options: TokenizeOptions, tokenizer: Tokenizer) -> None:
    if (options.append_eod or options.empty_doc == "eod") and tokenizer.eod_id is None:
        raise UserError(f"tokenizer {tokenizer.path} has no end-of-document token")
    if options.add_bos and tokenizer.bos_id is None:
        raise UserError(f"tokenizer {tokenizer.path} has no BOS token")


def choose_encoder(
    options: TokenizeOptions, tokenizer: Tokenizer, sources: list[Source]
) -> tuple[Encoder, str, int]:
    """The fast encoder if it gives the reference's ids on a sample of every input, else that one.

    Returns the encoder, its name, and how many texts were compared.
    """
    if options.reference_only:
        return _reference(tokenizer), "reference", 0
    if tokenizer.load_fast is None:
        print(f"note: {tokenizer.no_fast_reason}; using the reference library", file=sys.stderr)
        return _reference(tokenizer), "reference", 0
    fast = tokenizer.load_fast()
    compared = 0
    for source in sources if options.verify_sample else []:
        texts = sample_texts(source, options.keys, options.verify_sample)
        expected = tokenizer.reference.encode(texts) if texts else []
        for text, got, want in zip(texts, fast.encode_batch(texts), expected, strict=True):
            if got != want:
                print(
                    f"warning: {source.name}: the fast encoder differs from the reference on "
                    f"{text[:60]!r}; using the reference library",
                    file=sys.stderr,
                )
                return _reference(tokenizer), "reference", compared
        compared += len(texts)
    return fast, "fast", compared


def _reference(tokenizer: Tokenizer) -> Encoder:
    return python_encoder(tokenizer.reference.encode, tokenizer.vocab_size)


def _build(
    options: TokenizeOptions,
    tokenizer: Tokenizer,
    encoder: Encoder,
    sources: list[Source],
    targets: list[Target],
    at: Checkpoint,
) -> None:
    """Write .bin and .idx of all targets into their work folder, from the checkpoint on."""
    work = targets[0].work
    before = dict(at.counts)
    bad = BadLines(work, keep=options.on_error == "quarantine", sizes=at.sizes)

    def on_bad_line(source: str, line: int, message: str, raw: bytes) -> None:
        said = bad.add(source, line, message, raw)
        if bad.count <= BadLines.SHOWN:
            print(f"warning: {said}", file=sys.stderr)

    progress = Progress(sum(s.size for s in sources), before.get("input_bytes", 0))
    builder = DatasetBuilder(
        encoder,
        keys=list(options.keys),
        targets=[(str(t.work_file(".bin")), str(t.work_file(".idx"))) for t in targets],
        eod_id=tokenizer.eod_id,
        bos_id=tokenizer.bos_id if options.add_bos else None,
        append_eod=options.append_eod,
        empty_document=options.empty_doc,
        int32=tokenizer.int32,
        stop_on_error=options.on_error == "stop",
        workers=options.workers,
        resume_at=at.positions,
        on_bad_line=on_bad_line,
        on_written=progress.update,
    )

    def counts() -> dict[str, int]:
        return {name: n + before.get(name, 0) for name, n in builder.counts().items()}

    saved = 0
    with progress, bad:
        for i in range(at.source, len(sources)):
            first: tuple[int, int] = (at.offset, at.line) if i == at.source else (0, 0)
            step = options.checkpoint_bytes
            for offset, line in add_source(builder, sources[i], *first, step):
                if builder.counts()["input_bytes"] - saved >= step // 2:
                    saved = builder.counts()["input_bytes"]
                    at.reach(i, offset, line)
                    at.positions, at.counts, at.sizes = builder.sync(), counts(), bad.sync()
                    at.save(work)
        builder.finish()
        at.counts = counts()
        bad.sync()
    if bad.count > BadLines.SHOWN:
        where = f"see {options.out}.errors.txt"
        print(f"warning: {bad.count} bad lines in all; {where}", file=sys.stderr)


def _write_sidecar(
    target: Target,
    options: TokenizeOptions,
    tokenizer: Tokenizer,
    sources: list[Source],
    counts: dict[str, int],
    encoder: str,
) -> None:
    content: dict[str, Any] = {
        "schema": 1,
        "made_by": f"fastllm-data {__version__}",
        "tokenizer": tokenizer.describe(),
        "options": options.recorded(),
        "encoder": encoder,
        "dtype": "int32" if tokenizer.int32 else "uint16",
        "inputs": [source.describe() for source in sources],
        "counts": counts,
        "sha256": {
            suffix[1:]: sha256_file(target.work_file(suffix)) for suffix in (".bin", ".idx")
        },
    }
    write_json(target.work_file(".meta.json"), content)
