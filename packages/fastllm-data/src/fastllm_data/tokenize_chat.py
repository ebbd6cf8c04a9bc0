"""From chats to a dataset for instruction tuning: token ids, and a loss mask beside them.

``OUT_chat_document.{bin,idx}`` holds the ids of each chat; ``OUT_chat_mask.{bin,idx}``, in the same
format with uint8 items and the same lengths, holds 1 where a token is learnt and 0 where it is not.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastllm_data import __version__
from fastllm_data.chat import ChatEncoder, EncodedChat, read_chat
from fastllm_data.chat_template import ChatError, ChatTemplate, Span, load_chat_template
from fastllm_data.checkpoint import BadLines, lock_folder
from fastllm_data.documents import json_lines
from fastllm_data.errors import UserError
from fastllm_data.indexed_dataset import IndexedDatasetWriter
from fastllm_data.inputs import Source, find_sources
from fastllm_data.output import (
    WHERE_TO_WRITE,
    Target,
    empty_folder,
    open_work_folder,
    sha256_file,
    work_folder,
    write_json,
)
from fastllm_data.places import Places
from fastllm_data.progress import Progress
from fastllm_data.tokenizer import Tokenizer, load_tokenizer

BATCH_CHATS = 512
BATCH_CHARACTERS = 4 << 20  # the library needs about 60 bytes for each


@dataclass(frozen=True)
class ChatOptions:
    """What to read, with which tokenizer and template, to where. train_on: ``all`` or ``last``."""

    inputs: tuple[str, ...]
    tokenizer: Path
    out: Path
    template: Path | None = None
    train_on: str = "all"
    on_error: str = "stop"
    form: str = "auto"
    force: bool = False


@dataclass
class ChatCounts:
    """``straddling_tokens``: tokens that hold text of a prompt and of an answer; never learnt."""

    chats: int = 0
    tokens: int = 0
    learnt_tokens: int = 0
    straddling_tokens: int = 0
    text_bytes: int = 0
    bad_lines: int = 0


@dataclass(frozen=True)
class ChatSummary:
    """What a run did."""

    prefix: Path
    counts: ChatCounts
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "outputs": [f"{self.prefix}_chat_document", f"{self.prefix}_chat_mask"],
            **asdict(self.counts),
            "seconds": round(self.seconds, 3),
        }

    def to_text(self) -> str:
        c = self.counts
        share = 100 * c.learnt_tokens / max(1, c.tokens)
        rows = [
            ("chats", f"{c.chats:,}"),
            ("tokens", f"{c.tokens:,}, {c.learnt_tokens:,} learnt ({share:.1f} %)"),
            ("dropped lines", f"{c.bad_lines:,}"),
            ("time", f"{self.seconds:.2f} s, {c.text_bytes / 1e6 / self.seconds:.1f} MB a second"),
            ("wrote", f"{self.prefix}_chat_document.bin, .idx, .meta.json (ids)"),
            ("wrote", f"{self.prefix}_chat_mask.bin, .idx, .meta.json (1: learnt)"),
        ]
        return "\n".join(f"{name:14}{value}" for name, value in rows)


def tokenize_chat(options: ChatOptions) -> ChatSummary:
    """Run the whole job. Raises UserError; then nothing is left under the output's names."""
    started = time.perf_counter()
    sources = find_sources(options.inputs, options.form)
    path = _tokenizer_json(options.tokenizer)
    tokenizer = load_tokenizer(path)
    template = load_chat_template(path, options.template, tokenizer.special_tokens)
    encoder = ChatEncoder(path, template)
    targets = [
        Target(options.out.with_name(f"{options.out.name}_chat_{part}"), work_folder(options.out))
        for part in ("document", "mask")
    ]
    work = open_work_folder(options.out, targets, force=options.force, resume=False)
    with lock_folder(work):
        empty_folder(work)
        try:
            counts = _build(options, encoder, tokenizer, sources, targets)
            _write_sidecars(options, tokenizer, template, sources, targets, counts)
            for name in ("errors.txt", "quarantine"):
                final = options.out.with_name(f"{options.out.name}.{name}")
                if (work / name).exists():
                    (work / name).replace(final)
                else:
                    final.unlink(missing_ok=True)
            for target in targets:
                target.publish()
        except OSError as error:
            name = error.filename or options.out
            raise UserError(f"{name}: {error.strerror or error}", WHERE_TO_WRITE) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return ChatSummary(options.out, counts, max(1e-9, time.perf_counter() - started))


def _tokenizer_json(path: Path) -> Path:
    """Chat templates write special tokens into the text, which only a tokenizer.json knows."""
    found = path / "tokenizer.json" if path.is_dir() else path
    if found.suffix != ".json" or not found.is_file():
        raise UserError(
            f"tokenizer {path}: chats need a tokenizer.json",
            "give a Hugging Face tokenizer's folder",
        )
    return found


def _build(
    options: ChatOptions,
    encoder: ChatEncoder,
    tokenizer: Tokenizer,
    sources: list[Source],
    targets: list[Target],
) -> ChatCounts:
    counts = ChatCounts()
    bad = BadLines(targets[0].work, keep=options.on_error == "quarantine", sizes={})
    ids_type = "int32" if tokenizer.int32 else "uint16"
    # One entry per target; with_name of work_file("") is what the writer adds suffixes to.
    progress = Progress(sum(source.size for source in sources))
    with (
        IndexedDatasetWriter(targets[0].work_file(""), ids_type) as ids,
        IndexedDatasetWriter(targets[1].work_file(""), "uint8") as masks,
        bad,
        progress,
    ):
        for batch in _batches(options, encoder, sources, counts, bad, progress):
            for encoded in encoder.encode(batch):
                _add(encoded, ids, masks, counts)
            progress.update({
                "input_bytes": 0, "documents": counts.chats, "tokens": counts.tokens,
                "bad_lines": counts.bad_lines,
            })  # fmt: skip
        bad.sync()
    if counts.straddling_tokens:
        print(
            f"note: {counts.straddling_tokens} tokens hold text of a prompt and of an answer, "
            "and are not learnt",
            file=sys.stderr,
        )
    return counts


def _add(
    encoded: EncodedChat,
    ids: IndexedDatasetWriter,
    masks: IndexedDatasetWriter,
    counts: ChatCounts,
) -> None:
    ids.add(encoded.ids)
    ids.end_document()
    masks.add(encoded.weights)
    masks.end_document()
    counts.chats += 1
    counts.tokens += len(encoded.ids)
    counts.learnt_tokens += int(encoded.weights.sum())
    counts.straddling_tokens += encoded.straddling


def _batches(
    options: ChatOptions,
    encoder: ChatEncoder,
    sources: list[Source],
    counts: ChatCounts,
    bad: BadLines,
    progress: Progress,
) -> Iterator[list[tuple[str, list[Span]]]]:
    """Rendered chats, few enough at a time that memory stays small."""
    batch: list[tuple[str, list[Span]]] = []
    held = 0
    places = Places()
    for source in sources:
        for number, line in enumerate(json_lines(source, (), progress.meter), 1):
            if not line.strip():
                continue
            try:
                rendered = encoder.render(read_chat(line, options.train_on))
            except ChatError as error:
                name, at = places.of(source, number)
                if options.on_error == "stop":
                    raise UserError(
                        f"{name}:{at}: {error}", "--on-error skip or quarantine goes on past it"
                    ) from error
                counts.bad_lines += 1
                said = bad.add(name, at, str(error), line)
                if bad.count <= BadLines.SHOWN:
                    progress.say(f"warning: {said}")
                continue
            batch.append(rendered)
            counts.text_bytes += len(rendered[0].encode())
            held += len(rendered[0])
            if len(batch) >= BATCH_CHATS or held >= BATCH_CHARACTERS:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def _write_sidecars(
    options: ChatOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    sources: list[Source],
    targets: list[Target],
    counts: ChatCounts,
) -> None:
    dataset = {"documents": counts.chats, "sequences": counts.chats, "tokens": counts.tokens}
    ids_type = "int32" if tokenizer.int32 else "uint16"
    kinds: list[tuple[str, dict[str, Any]]] = [
        (ids_type, tokenizer.describe()),
        # The mask's items are 0 and 1: a vocabulary of two, for verify.
        ("uint8", {"kind": "loss mask", "file": "", "sha256": "", "vocab_size": 2}),
    ]
    for target, (dtype, described) in zip(targets, kinds, strict=True):
        content = {
            "schema": 1,
            "made_by": f"fastllm-data {__version__}",
            "tokenizer": described,
            "options": {"train_on": options.train_on, "on_error": options.on_error},
            "chat_template_sha256": template.sha256,
            "dtype": dtype,
            "inputs": [source.describe() for source in sources],
            "counts": asdict(counts),
            "dataset": dataset,
            "sha256": {
                suffix[1:]: sha256_file(target.work_file(suffix)) for suffix in (".bin", ".idx")
            },
        }
        write_json(target.work_file(".meta.json"), content)
