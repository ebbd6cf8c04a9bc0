"""What a tokenize job is told, and what it says when it is done."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm_data.errors import UserError

CHECKPOINT_BYTES = 256 << 20  # of input: some seconds of work


@dataclass(frozen=True)
class TokenizeOptions:
    """What to read, with which tokenizer, to where, and how.

    form: what a document is (``inputs.FORMATS``, or ``auto``). split_sentences: a language whose
    sentences become sequences; None: a text is one sequence.
    """

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
    form: str = "auto"
    split_sentences: str | None = None
    keep_newlines: bool = False
    hash_inputs: bool = False

    @property
    def level(self) -> str:
        """Megatron's word for what a sequence is, part of the output's name."""
        return "document" if self.split_sentences is None else "sentence"

    def deciding(self) -> dict[str, Any]:
        """The switches that decide the bytes of the output."""
        return {
            "keys": list(self.keys),
            "format": self.form,
            "append_eod": self.append_eod,
            "add_bos": self.add_bos,
            "parse_special": self.parse_special,
            "empty_doc": self.empty_doc,
            "split_sentences": self.split_sentences,
            "keep_newlines": self.keep_newlines,
        }

    def recorded(self) -> dict[str, Any]:
        """What the sidecar says of the switches."""
        return {**self.deciding(), "on_error": self.on_error}

    def check(self) -> None:
        """Raises UserError for switches that do not go together."""
        repeated = [key for key, count in Counter(self.keys).items() if count > 1]
        if repeated:
            raise UserError(f"key {repeated[0]!r} is given twice")
        if self.form.startswith("text") and len(self.keys) > 1:
            raise UserError(f"--format {self.form} has one text a document, so one --key")


@dataclass
class Summary:
    """What a run did."""

    prefixes: list[str]
    encoder: str
    verified_samples: int
    seconds: float
    counts: dict[str, int]
    errors_file: str | None = None

    def to_dict(self) -> dict[str, Any]:
        mb = self.counts["text_bytes"] / 1e6
        return {
            "outputs": self.prefixes,
            **self.counts,
            "tokens_per_byte": self.counts["tokens"] / max(1, self.counts["text_bytes"]),
            "encoder": self.encoder,
            "verified_samples": self.verified_samples,
            "errors_file": self.errors_file,
            "seconds": round(self.seconds, 3),
            "mb_per_second": round(mb / max(self.seconds, 1e-9), 2),
            "tokens_per_second": round(self.counts["tokens"] / max(self.seconds, 1e-9)),
        }

    def to_text(self) -> str:
        d = self.to_dict()
        listed = f", listed in {self.errors_file}" if self.errors_file else ""
        rows = [
            ("documents", f"{d['documents']:,} ({d['empty_documents']:,} empty)"),
            ("tokens", f"{d['tokens']:,} ({d['tokens_per_byte']:.3f} a byte)"),
            ("dropped lines", f"{d['bad_lines']:,}{listed}"),
            ("encoder", f"{d['encoder']}, {d['verified_samples']} texts compared"),
            ("time", f"{d['seconds']:.2f} s, {d['mb_per_second']:.1f} MB of text a second"),
        ]
        rows += [("wrote", f"{prefix}.bin, .idx, .meta.json") for prefix in self.prefixes]
        lines = [f"{name:14}{value}" for name, value in rows]
        return "\n".join([*lines, f"next: fastllm-data stats {self.prefixes[0]}"])
