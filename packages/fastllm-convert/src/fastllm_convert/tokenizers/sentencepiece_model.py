"""Reads a SentencePiece ``.model``: the few protobuf fields that decide how text is encoded.

Message layout: sentencepiece_model.proto of google/sentencepiece. Wire format:
https://protobuf.dev/programming-guides/encoding. Unknown fields are skipped; sizes are checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from fastllm_convert.errors import UserError

MAX_MODEL_BYTES = 256 << 20


class Kind(IntEnum):
    """``SentencePiece.Type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    score: float
    kind: Kind


@dataclass
class SentencePieceModel:
    """``model_type``: 1 unigram, 2 BPE, 3 word, 4 char. ``*_id`` are -1 when there is none."""

    tokens: list[Token] = field(default_factory=list[Token])
    model_type: int = 1
    byte_fallback: bool = False
    whitespace_as_suffix: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


Value = int | bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("truncated number")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(field number, value): varints as int, everything else as raw bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("truncated field")
        yield number, data[at : at + size]
        at += size


def _raw(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a message where a number stands")
    return value


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a number where bytes stand")
    # int32 is sign-extended to 64 bits on the wire.
    return value - (1 << 64) if value >> 63 else value


def _token(data: bytes) -> Token:
    text, score, kind = "", 0.0, Kind.NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _raw(value).decode("utf-8")
        elif number == 2:
            (score,) = struct.unpack("<f", _raw(value))
        elif number == 3:
            kind = Kind(_int(value))
    return Token(text, score, kind)


_TRAINER = {3: "model_type", 40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
_TRAINER_FLAGS = {24: "whitespace_as_suffix", 35: "byte_fallback"}
_NORMALIZER_FLAGS = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


def parse(data: bytes) -> SentencePieceModel:
    """Bytes of a ``.model``. Raises ``ValueError`` for anything that is not one."""
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            model.tokens.append(_token(_raw(value)))
        elif number == 2:
            for key, item in _fields(_raw(value)):
                if key in _TRAINER:
                    setattr(model, _TRAINER[key], _int(item))
                elif key in _TRAINER_FLAGS:
                    setattr(model, _TRAINER_FLAGS[key], bool(_int(item)))
        elif number == 3:
            for key, item in _fields(_raw(value)):
                if key == 2:
                    model.charsmap = _raw(item)
                elif key in _NORMALIZER_FLAGS:
                    setattr(model, _NORMALIZER_FLAGS[key], bool(_int(item)))
    if not model.tokens:
        raise ValueError("no pieces")
    unknown = [i for i, t in enumerate(model.tokens) if t.kind is Kind.UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"{len(unknown)} unknown pieces, not one")
    model.unk_id = unknown[0]
    return model


def read(path: Path) -> SentencePieceModel:
    """A ``.model`` file. Raises ``UserError``."""
    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise UserError(f"{path} is too large for a SentencePiece model")
        return parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, struct.error) as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from None
