"""Tokenizer files: which kind one is, its ids, its reference library, its fast encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastllm_core import Encoder, InputError, sentencepiece_encoder, sentencepiece_info
from fastllm_data.errors import UserError
from fastllm_data.tiktoken_file import (
    RankFile,
    looks_like_rank_file,
    parse_rank_file,
    parse_tekken,
)
from fastllm_data.tokenizer_json import fast_encoder, gpt2_library, parse_gpt2

EncodeBatch = Callable[[list[str]], list[list[int]]]
DecodeIds = Callable[[list[int]], str]

# End-of-document tokens of well-known tokenizers, in the order in which they are tried.
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
BOS_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>")


@dataclass(frozen=True)
class Reference:
    """The reference library's functions; loading them imports that library."""

    encode: EncodeBatch
    decode: DecodeIds


@dataclass(frozen=True)
class Tokenizer:
    """One tokenizer file. Nothing heavy is imported before ``reference`` is used."""

    kind: str
    path: Path
    sha256: str
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    load_reference: Callable[[], Reference] = field(repr=False)
    load_fast: Callable[[], Encoder] | None = field(default=None, repr=False)
    no_fast_reason: str = ""
    special_tokens: tuple[str, ...] = ()  # of a tokenizer.json

    @cached_property
    def reference(self) -> Reference:
        return self.load_reference()

    @property
    def int32(self) -> bool:
        """Whether token files of this vocabulary hold int32; Megatron's limit is 65,500."""
        return self.vocab_size >= 65500

    def describe(self) -> dict[str, Any]:
        """What the sidecar records."""
        return {
            "kind": self.kind,
            "file": self.path.name,
            "path": str(self.path.absolute()),
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            "bos_id": self.bos_id,
        }


def load_tokenizer(
    path: Path, *, merges: Path | None = None, parse_special: bool | None = None
) -> Tokenizer:
    """Read a tokenizer file; its kind is found from its content.

    SentencePiece ``.model``; Hugging Face ``tokenizer.json``; GPT-2 ``vocab.json`` with ``merges``
    (default: merges.txt beside it); tiktoken ranks; tekken JSON; or a folder with one of these.

    parse_special: whether text that looks like a special token becomes its id; None: as the
    reference library does (only tokenizer.json and GPT-2 files: yes). Raises UserError.
    """
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json", "vocab.json"):
            if (path / name).is_file():
                return load_tokenizer(path / name, merges=merges, parse_special=parse_special)
        raise UserError(f"{path}: no tokenizer.model, tokenizer.json or vocab.json in this folder")
    content = _read(path)
    if content[:1] == b"{":
        return _json_tokenizer(path, content, merges, parse_special)
    if parse_special:
        raise UserError("only tokenizer.json and GPT-2 files have special tokens to parse in text")
    if looks_like_rank_file(content):
        return _rank_tokenizer("tiktoken", path, content, parse_rank_file(str(path), content))
    return _sentencepiece(path, content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer {path}: {error.strerror}", "fastllm-data train-tokenizer makes one"
        ) from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sentencepiece(path: Path, content: bytes) -> Tokenizer:
    try:
        info = sentencepiece_info(content)
    except InputError as error:
        raise UserError(
            f"tokenizer {path}: {error}",
            "known kinds: SentencePiece .model, tokenizer.json, vocab.json + merges.txt, tiktoken",
        ) from error

    def reference() -> Reference:
        from sentencepiece import SentencePieceProcessor

        processor: Any = SentencePieceProcessor()
        processor.LoadFromSerializedProto(content)

        def encode(texts: list[str]) -> list[list[int]]:
            return [processor.EncodeAsIds(text) for text in texts]

        return Reference(encode=encode, decode=processor.DecodeIds)

    reason: str = info["unsupported"]

    def fast() -> Encoder:
        return sentencepiece_encoder(content)

    def known(token: int) -> int | None:
        return token if token >= 0 else None

    return Tokenizer(
        kind="sentencepiece",
        path=path,
        sha256=_digest(content),
        vocab_size=info["vocab_size"],
        eod_id=known(info["eos_id"]),
        bos_id=known(info["bos_id"]),
        load_reference=reference,
        load_fast=None if reason else fast,
        no_fast_reason=reason,
    )


def _rank_tokenizer(kind: str, path: Path, content: bytes, ranks: RankFile) -> Tokenizer:
    def reference() -> Reference:
        encoding: Any = ranks.reference()
        first = ranks.first_id

        def encode(texts: list[str]) -> list[list[int]]:
            return [[i + first for i in encoding.encode_ordinary(text)] for text in texts]

        return Reference(
            encode, lambda ids: encoding.decode([i - first for i in ids if i >= first])
        )

    return Tokenizer(
        kind=kind,
        path=path,
        sha256=_digest(content),
        vocab_size=ranks.family.vocab_size,
        eod_id=ranks.family.eod_id,
        bos_id=ranks.family.bos_id,
        load_reference=reference,
        load_fast=ranks.fast,
    )


def _json_tokenizer(
    path: Path, content: bytes, merges: Path | None, parse_special: bool | None
) -> Tokenizer:
    serialized: bytes | None = content
    try:
        parsed: dict[str, Any] = json.loads(content)
        # By type, not by presence: "config", "vocab" and "model" are tokens of GPT-2.
        if isinstance(parsed.get("config"), dict) and isinstance(parsed.get("vocab"), list):
            return _rank_tokenizer("tekken", path, content, parse_tekken(str(path), parsed))
        if not isinstance(parsed.get("model"), dict):
            merges_txt = _read(merges if merges is not None else path.with_name("merges.txt"))
            parsed = parse_gpt2(content, merges_txt)
            content += merges_txt
            serialized = None
        vocab: dict[str, int] | list[Any] = parsed["model"]["vocab"]
        listed: list[dict[str, Any]] = parsed["added_tokens"] or []
        added: dict[str, int] = {t["content"]: int(t["id"]) for t in listed}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"tokenizer {path}: neither a tokenizer.json nor a vocab.json: {error!r}"
        ) from error
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    names: dict[str, int] = {**(vocab if isinstance(vocab, dict) else {}), **added}

    def first(candidates: tuple[str, ...]) -> int | None:
        return next((names[name] for name in candidates if name in names), None)

    def reference() -> Reference:
        from tokenizers import Tokenizer as HFTokenizer

        hf = HFTokenizer.from_buffer(serialized) if serialized else gpt2_library(parsed)
        hf.no_truncation()  # some files say that texts are to be cut, or filled, to a length
        hf.no_padding()
        hf.encode_special_tokens = parse_special is False

        def encode(texts: list[str]) -> list[list[int]]:
            return [e.ids for e in hf.encode_batch(texts, add_special_tokens=False)]

        return Reference(encode=encode, decode=lambda ids: hf.decode(ids, False))

    encoder, reason = fast_encoder(parsed, parse_special is not False)

    return Tokenizer(
        kind="tokenizer.json",
        path=path,
        sha256=_digest(content),
        vocab_size=max([*ids, *added.values()], default=-1) + 1,
        eod_id=first(EOD_TOKENS),
        bos_id=first(BOS_TOKENS),
        load_reference=reference,
        load_fast=None if encoder is None else lambda: encoder,
        no_fast_reason=reason,
        special_tokens=tuple(t["content"] for t in listed if t.get("special")),
    )
