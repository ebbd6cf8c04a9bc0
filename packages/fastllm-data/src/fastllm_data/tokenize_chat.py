"""From chats to a dataset for instruction tuning: token ids, and a loss mask beside them.

``OUT_chat_document.{bin,idx}`` holds the ids of each chat; ``OUT_chat_mask.{bin,idx}``, in the same
format with uint8 items and the same lengths, holds 1 where a token is learnt and 0 where it is not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastllm_data import __version__
from fastllm_data.chat import ChatEncoder, EncodedChat, read_chat
from fastllm_data.chat_files import ChatFiles
from fastllm_data.chat_template import ChatError, ChatTemplate, Span, load_chat_template
from fastllm_data.checkpoint import (
    STATE_FILE,
    BadLines,
    Checkpoint,
    load_checkpoint,
    lock_folder,
)
from fastllm_data.documents import json_lines
from fastllm_data.errors import UserError
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
CHECKPOINT_SECONDS = 15  # between points from which --resume can go on


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
    resume: bool = False


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
    targets = (_target(options.out, "document"), _target(options.out, "mask"))
    work = open_work_folder(options.out, list(targets), force=options.force, resume=options.resume)
    with lock_folder(work):
        if not options.resume:
            empty_folder(work)
        at = load_checkpoint(work, _fingerprint(options, tokenizer, template, sources))
        try:
            if at.stage == "build":
                _build(options, encoder, tokenizer, sources, targets, at)
                _write_sidecars(options, tokenizer, template, sources, targets, at)
                at.stage = "publish"
                at.save(work)
            _publish(options.out, targets, at)
        except OSError as error:
            name = error.filename or options.out
            hint = _what_is_kept(work) or WHERE_TO_WRITE
            raise UserError(f"{name}: {error.strerror or error}", hint) from error
        except UserError as error:
            hints = [hint for hint in (error.hint, _what_is_kept(work)) if hint]
            raise UserError(str(error), "; ".join(hints)) from error
        except KeyboardInterrupt:
            if said := _what_is_kept(work):
                print(f"note: {said}", file=sys.stderr)
            raise
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
    seconds = max(1e-9, time.perf_counter() - started)
    return ChatSummary(options.out, ChatCounts(**at.counts), seconds)


def _target(out: Path, part: str) -> Target:
    return Target(out.with_name(f"{out.name}_chat_{part}"), work_folder(out))


def _fingerprint(
    options: ChatOptions, tokenizer: Tokenizer, template: ChatTemplate, sources: list[Source]
) -> dict[str, Any]:
    """What must be the same for a stopped run to go on; how bad lines are met may change."""
    identity = json.dumps([source.identity() for source in sources]).encode()
    return {
        "tokenizer": tokenizer.sha256,
        "chat template": template.sha256,
        "options": {"train_on": options.train_on},
        "inputs": hashlib.sha256(identity).hexdigest(),
    }


def _what_is_kept(work: Path) -> str:
    """What to say of a stopped run; its work goes if there is no checkpoint to go on from."""
    if (work / STATE_FILE).exists():
        return "--resume goes on from the last checkpoint"
    shutil.rmtree(work, ignore_errors=True)
    return ""


def _publish(out: Path, targets: tuple[Target, Target], at: Checkpoint) -> None:
    work = targets[0].work
    for name in ("errors.txt", "quarantine"):
        final = out.with_name(f"{out.name}.{name}")
        if (work / name).exists():
            (work / name).replace(final)
        elif not at.sizes.get(name):  # else a run that was killed here has moved it
            final.unlink(missing_ok=True)
    for target in targets:
        target.publish()


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
    targets: tuple[Target, Target],
    at: Checkpoint,
) -> None:
    """From a checkpoint, which moves along, to the end of the input."""
    counts = ChatCounts(**at.counts)
    work = targets[0].work
    bad = BadLines(work, keep=options.on_error == "quarantine", sizes=at.sizes)
    ids_type = "int32" if tokenizer.int32 else "uint16"
    progress = Progress(sum(source.size for source in sources))
    files = ChatFiles(targets, ids_type, counts.chats, counts.tokens)

    def reach(source: int, line: int) -> None:
        files.sync()
        at.sizes = bad.sync()
        at.counts = asdict(counts)
        at.reach(source, 0, line)

    saved = time.monotonic()
    with files, bad, progress:
        for batch, source, line in _batches(options, encoder, sources, counts, bad, progress, at):
            for encoded in encoder.encode(batch):
                _add(encoded, files, counts)
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                reach(source, line)
                at.save(work)
                saved = time.monotonic()
            progress.update({
                "input_bytes": 0, "documents": counts.chats, "tokens": counts.tokens,
                "bad_lines": counts.bad_lines,
            })  # fmt: skip
        reach(len(sources), 0)
        files.finish()
    if counts.straddling_tokens:
        print(
            f"note: {counts.straddling_tokens} tokens hold text of a prompt and of an answer, "
            "and are not learnt",
            file=sys.stderr,
        )


def _add(encoded: EncodedChat, files: ChatFiles, counts: ChatCounts) -> None:
    files.add(encoded)
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
    at: Checkpoint,
) -> Iterator[tuple[list[tuple[str, list[Span]]], int, int]]:
    """Rendered chats, few enough at a time that memory stays small.

    With each batch, how far the input has been read: number of the source, lines of it.
    """
    first, passed = at.source, at.line
    batch: list[tuple[str, list[Span]]] = []
    held = 0
    places = Places()
    for here, source in enumerate(sources[first:], first):
        for number, line in enumerate(json_lines(source, (), progress.meter), 1):
            if (here == first and number <= passed) or not line.strip():
                continue
            try:
                rendered = encoder.render(read_chat(line, options.train_on))
            except ChatError as error:
                name, place = places.of(source, number)
                if options.on_error == "stop":
                    raise UserError(
                        f"{name}:{place}: {error}", "--on-error skip or quarantine goes on past it"
                    ) from error
                counts.bad_lines += 1
                said = bad.add(name, place, str(error), line)
                if bad.count <= BadLines.SHOWN:
                    progress.say(f"warning: {said}")
                continue
            batch.append(rendered)
            counts.text_bytes += len(rendered[0].encode())
            held += len(rendered[0])
            if len(batch) >= BATCH_CHATS or held >= BATCH_CHARACTERS:
                yield batch, here, number
                batch, held = [], 0
    if batch:
        yield batch, len(sources), 0


def _write_sidecars(
    options: ChatOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    sources: list[Source],
    targets: tuple[Target, Target],
    at: Checkpoint,
) -> None:
    chats, tokens = at.counts["chats"], at.counts["tokens"]
    dataset = {"documents": chats, "sequences": chats, "tokens": tokens}
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
            "counts": at.counts,
            "dataset": dataset,
            "sha256": {
                suffix[1:]: sha256_file(target.work_file(suffix)) for suffix in (".bin", ".idx")
            },
        }
        write_json(target.work_file(".meta.json"), content)
