"""From text to datasets: choose the encoder, run the builder, publish the result."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllm_core import DatasetBuilder, Encoder, InputError, python_encoder
from fastllm_data import __version__
from fastllm_data.errors import UserError
from fastllm_data.inputs import Source, add_source, find_sources, sample_texts
from fastllm_data.output import Target, open_work_folder, sha256_file, targets_of, write_json
from fastllm_data.progress import Progress
from fastllm_data.tokenizer import Tokenizer, load_tokenizer

BAD_LINES_SHOWN = 5


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
    bad_lines: list[str] = field(default_factory=list[str])

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
    started = time.perf_counter()
    work = open_work_folder(options.out, targets, force=options.force)
    try:
        encoder, name, verified = choose_encoder(options, tokenizer, sources)
        builder, bad = _build(options, tokenizer, encoder, sources, targets)
        counts = builder.counts()
        for target in targets:
            _write_sidecar(target, options, tokenizer, sources, counts, name)
        _publish(targets, bad)
    except InputError as error:
        hint = "--on-error skip or quarantine goes on past bad lines" if ":" in str(error) else ""
        raise UserError(str(error), hint) from error
    except OSError as error:
        raise UserError(f"{error.filename or options.out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Summary(
        prefixes=[str(target.prefix) for target in targets],
        encoder=name,
        verified_samples=verified,
        seconds=time.perf_counter() - started,
        counts=counts,
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
            if got.tolist() != want:
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
) -> tuple[DatasetBuilder, list[Path]]:
    bad = BadLines(options, targets[0].work)
    with Progress(sum(source.size for source in sources)) as progress:
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
            on_bad_line=bad.add,
            on_written=progress.update,
        )
        for source in sources:
            add_source(builder, source)
        builder.finish()
    return builder, bad.close(options.out)


class BadLines:
    """Lists bad lines in OUT.errors.txt and, for quarantine, keeps them in OUT.quarantine."""

    def __init__(self, options: TokenizeOptions, work: Path) -> None:
        self._quarantine = options.on_error == "quarantine"
        self._work = work
        self._count = 0

    def add(self, source: str, line: int, message: str, raw: bytes) -> None:
        self._count += 1
        if self._count <= BAD_LINES_SHOWN:
            print(f"warning: {source}:{line}: {message}", file=sys.stderr)
        with (self._work / "errors.txt").open("a", encoding="utf-8") as file:
            file.write(f"{source}:{line}: {message}\n")
        if self._quarantine:
            with (self._work / "quarantine").open("ab") as file:
                file.write(raw + b"\n")

    def close(self, out: Path) -> list[Path]:
        """The lists that were written."""
        if self._count > BAD_LINES_SHOWN:
            print(f"warning: {self._count} bad lines in all; see {out}.errors.txt", file=sys.stderr)
        return [p for p in (self._work / "errors.txt", self._work / "quarantine") if p.exists()]


def _publish(targets: list[Target], bad: list[Path]) -> None:
    out = targets[0].work.with_suffix("")
    for path in bad:
        path.replace(out.with_name(f"{out.name}.{path.name}"))
    for target in targets:
        target.publish()


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
