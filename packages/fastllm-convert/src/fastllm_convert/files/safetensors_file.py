"""safetensors headers: u64 little-endian length, JSON, then the tensors without holes.

Format: https://github.com/huggingface/safetensors#format. Checked here beyond what the library
checks: duplicate JSON keys (safetensors 0.8 accepts them and two readers may then disagree).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fastllm_convert.arrays import Array, SourceFile, from_file
from fastllm_convert.dtypes import BY_CODE, DType
from fastllm_convert.errors import UserError
from fastllm_convert.files.json_file import parse_object

MAX_HEADER = 100_000_000  # the library's own limit
_METADATA = "__metadata__"


def read_header(path: Path) -> dict[str, Array]:
    """Tensor name → where its bytes lie. Raises ``UserError`` for a file that breaks the format."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise UserError(f"{path} is cut short: {size} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(MAX_HEADER, size - 8):
                raise UserError(
                    f"{path}: header length {length} is beyond "
                    + (
                        "the limit of 100,000,000" if length > MAX_HEADER else "the end of the file"
                    ),
                    hint="the file is damaged, or not safetensors",
                )
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    header = parse_object(raw, f"{path} header")
    return _tensors(header, SourceFile(path, size), 8 + length)


def _tensors(header: dict[str, Any], file: SourceFile, base: int) -> dict[str, Array]:
    _check_metadata(header.pop(_METADATA, None), file.path)
    found: dict[str, Array] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        shape, dtype, begin, end = _entry(entry, name, file.path)
        spans.append((begin, end, name))
        found[name] = from_file(file, base + begin, shape, dtype)
    spans.sort()
    at = 0
    for begin, end, name in spans:
        if begin != at:
            what = (
                "overlaps another tensor" if begin < at else f"leaves a hole of {begin - at} bytes"
            )
            raise UserError(f"{file.path}: {name!r} {what}", hint="the file is damaged")
        at = end
    if base + at != file.size:
        what = "cut short" if base + at > file.size else "followed by bytes that no tensor owns"
        raise UserError(
            f"{file.path} is {what}: tensors end at byte {base + at}, the file at {file.size}"
        )
    return found


def _entry(entry: object, name: str, path: Path) -> tuple[list[int], DType, int, int]:
    bad = UserError(f"{path}: header entry of {name!r} is malformed")
    if not isinstance(entry, dict):
        raise bad
    fields = cast("dict[str, object]", entry)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad
    shape, offsets = _sizes(fields["shape"]), _sizes(fields["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2 or len(shape) > 16:
        raise bad
    code = fields["dtype"]
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise UserError(f"{path}: {name!r} has the unknown type {code!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise UserError(
            f"{path}: {name!r} claims {end - begin} bytes, its shape {shape} needs "
            f"{math.prod(shape) * dtype.itemsize}"
        )
    return shape, dtype, begin, end


def _sizes(value: object) -> list[int] | None:
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    # 2^63: no file is larger, and products stay exact in Python's integers anyway.
    ok = all(type(v) is int and 0 <= v < 1 << 63 for v in items)
    return cast("list[int]", items) if ok else None


def _check_metadata(value: object, path: Path) -> None:
    if value is None:
        return
    if not isinstance(value, dict) or not all(
        isinstance(v, str) for v in cast("dict[str, object]", value).values()
    ):
        raise UserError(f"{path}: __metadata__ is not a mapping of strings")


def write_order(tensors: Mapping[str, DType]) -> list[str]:
    """The order ``safetensors.save_file`` writes: widest type first, then by name.

    Types of one width have an order of their own: that of the Rust enum, descending.
    """
    return sorted(tensors, key=lambda name: (-_RANK[tensors[name].code], name))


_ORDER = "BOOL U8 I8 F8_E5M2 F8_E4M3 I16 U16 F16 BF16 I32 U32 F32 F64 I64 U64"
_RANK = {code: rank for rank, code in enumerate(_ORDER.split())}


def build_header(tensors: Sequence[tuple[str, DType, Sequence[int]]]) -> bytes:
    """Length prefix and JSON for tensors laid out in the given order, padded to 8 bytes."""
    header: dict[str, object] = {_METADATA: {"format": "pt"}}  # transformers refuses files without
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
