"""A ``torch.save`` file as a plan: where every storage will lie, before any is copied.

Members are stored, aligned to 64 bytes (as torch aligns them, so that they can be mapped), with
correct CRC-32 and zip64 fields beyond 4 GB. Zip layout: PKWARE APPNOTE 4.3.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastllm_convert.engine.plan import OutputFile, Piece
from fastllm_convert.files import crc32
from fastllm_convert.files.torch_pickle_writer import dumps

_ALIGNMENT = 64
_MASK = 0xFFFFFFFF
_ROOT = "archive"


@dataclass(frozen=True, slots=True)
class _Slot:
    """A member: local header at ``header``, content at ``offset``. ``piece`` None: ``content``."""

    name: bytes
    header: int
    offset: int
    size: int
    content: bytes | None

    def local_header(self, crc: int) -> bytes:
        zip64 = self.size >= _MASK
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size) if zip64 else b""
        # "FB", as torch names its padding field.
        pad = self.offset - self.header - 30 - len(self.name) - len(extra) - 4
        extra += struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        size = _MASK if zip64 else self.size
        return (
            struct.pack(
                "<4s5H3L2H", b"PK\x03\x04", 45 if zip64 else 20, 0x800, 0, 0, _DATE, crc, size,
                size, len(self.name), len(extra),
            )
            + self.name
            + extra
        )  # fmt: skip

    def directory_entry(self, crc: int) -> bytes:
        big_size, big_offset = self.size >= _MASK, self.header >= _MASK
        values = [self.size, self.size] * big_size + [self.header] * big_offset
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        size = _MASK if big_size else self.size
        header = _MASK if big_offset else self.header
        version = 45 if values else 20
        return (
            struct.pack(
                "<4s6H3L5H2L", b"PK\x01\x02", version, version, 0x800, 0, 0, _DATE, crc, size,
                size, len(self.name), len(extra), 0, 0, 0, 0, header,
            )
            + self.name
            + extra
        )  # fmt: skip


_DATE = 0x21  # 1980-01-01: output depends on the input alone


def _slots(members: Sequence[tuple[str, int, bytes | None]]) -> list[_Slot]:
    slots: list[_Slot] = []
    at = 0
    for name, size, content in members:
        raw = f"{_ROOT}/{name}".encode()
        zip64 = 20 if size >= _MASK else 0
        least = at + 30 + len(raw) + zip64 + 4
        offset = -(-least // _ALIGNMENT) * _ALIGNMENT
        slots.append(_Slot(raw, at, offset, size, content))
        at = offset + size
    return slots


def _directory(slots: Sequence[_Slot], crcs: Sequence[int], at: int) -> bytes:
    raw = b"".join(s.directory_entry(c) for s, c in zip(slots, crcs, strict=True))
    count = len(slots)
    end = b""
    if at >= _MASK or count >= 0xFFFF:
        record = struct.pack(
            "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(raw), at
        )
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, at + len(raw), 1)
        end = record + locator
    small = min(count, 0xFFFF)
    return (
        raw
        + end
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, small, small, len(raw), min(at, _MASK), 0)
    )


def torch_file(path: str, value: Any) -> OutputFile:
    """``value``: see ``torch_pickle_writer``. ``torch.load`` reads the file, and so do we."""
    pickled, tensors = dumps(value)
    members: list[tuple[str, int, bytes | None]] = [("data.pkl", len(pickled), pickled)]
    members += [("byteorder", 6, b"little")]
    members += [
        (f"data/{i}", t.array.numel * t.dtype.itemsize, None) for i, t in enumerate(tensors)
    ]
    members += [("version", 2, b"3\n")]
    slots = _slots(members)
    stored = [s for s in slots if s.content is None]
    pieces = tuple(
        Piece(s.name.decode(), s.offset, t.array, t.dtype)
        for s, t in zip(stored, tensors, strict=True)
    )
    end = slots[-1].offset + slots[-1].size
    literals = tuple((s.offset, s.content) for s in slots if s.content is not None)

    def finish(crcs: Sequence[int]) -> list[tuple[int, bytes]]:
        given = iter(crcs)
        all_crcs = [next(given) if s.content is None else crc32.of(s.content) for s in slots]
        headers = [(s.header, s.local_header(c)) for s, c in zip(slots, all_crcs, strict=True)]
        return [*headers, (end, _directory(slots, all_crcs, end))]

    size = end + len(_directory(slots, [0] * len(slots), end))
    return OutputFile(path, size, pieces, literals, finish)
