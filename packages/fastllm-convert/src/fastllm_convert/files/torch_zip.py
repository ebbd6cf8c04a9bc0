"""The zip container of ``torch.save`` (since torch 1.6): stored members, tensors left on disk.

Layout: ``<root>/data.pkl``, ``<root>/data/<key>`` (one raw little-endian storage each),
``<root>/byteorder``, ``<root>/version``. Zip: PKWARE APPNOTE 4.3 (local header, central directory,
zip64). The central directory decides; the local headers must agree with it, because readers that
trust one or the other must not see two different files.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

from fastllm_convert.arrays import Array, SourceFile, contiguous_strides, from_file
from fastllm_convert.dtypes import BY_STORAGE, DType
from fastllm_convert.errors import UserError
from fastllm_convert.files import crc32, torch_pickle
from fastllm_convert.files.torch_globals import Call, Rebuild

MAX_DIRECTORY_BYTES = 64 << 20
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ZIP64_EXTRA = 1


class Member(NamedTuple):
    """A stored member: its bytes are file[offset : offset + size]."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    method: int
    flags: int
    crc: int
    packed: int
    size: int
    header: int


class _StorageRef(NamedTuple):
    dtype: DType
    member: Member
    numel: int


@dataclass(frozen=True, slots=True)
class TorchFile:
    """``value``: the pickled object, its tensors as ``Array``s into ``file``."""

    file: SourceFile
    value: Any
    members: dict[str, Member]

    @property
    def entries(self) -> dict[str, Any]:
        """The value as a mapping. Raises ``UserError`` when it is something else."""
        value: object = self.value
        if not isinstance(value, dict):
            raise UserError(f"{self.file.path} holds a {type(value).__name__}, not a dict")
        return cast("dict[str, Any]", value)


def read_torch(path: Path, *, start: int = 0, size: int | None = None) -> TorchFile:
    """Read a ``torch.save`` file, or the one embedded at ``start`` with ``size`` bytes.

    Touches the directory and the pickle only. Raises ``UserError`` for anything malformed.
    """
    try:
        with path.open("rb") as file:
            total = file.seek(0, 2)
            if start + (size or 0) > total:
                raise UserError(f"{path} is cut short: {total:,} bytes")
            if total == 0:
                raise UserError(f"{path} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                window = _Window(data, start, total - start if size is None else size)
                return _read(window, SourceFile(path, total))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except torch_pickle.PickleError as error:
        raise UserError(f"{path}: {error.message}", error.hint) from None


class _Window:
    """Bytes [start, start + size) of a mapping, bounds-checked."""

    def __init__(self, data: mmap.mmap, start: int, size: int) -> None:
        self.data, self.start, self.size = data, start, size

    def get(self, offset: int, count: int) -> bytes:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise UserError("zip directory points past the end of the file")
        return self.data[self.start + offset : self.start + offset + count]


def _read(window: _Window, file: SourceFile) -> TorchFile:
    try:
        entries = list(_directory(window))
        members = _members(window, entries)
        root = _root(members)
        order = members.get(root + "byteorder")
        if order is not None and (order.size > 16 or _content(window, order) != b"little"):
            raise UserError("written on a big-endian machine: not supported")
    except UserError as error:
        raise UserError(f"{file.path}: {error.message}", error.hint) from None
    if members[root + "data.pkl"].size > torch_pickle.MAX_PICKLE_BYTES:
        raise UserError(
            f"{file.path}: its pickle is beyond {torch_pickle.MAX_PICKLE_BYTES:,} bytes"
        )

    def storage(ref: torch_pickle.Storage) -> _StorageRef:
        member = members.get(f"{root}data/{ref.key}")
        if member is None:
            raise torch_pickle.PickleError(f"storage {ref.key} is not in the archive")
        dtype = BY_STORAGE[ref.type_name]
        if ref.numel * dtype.itemsize > member.size:
            raise torch_pickle.PickleError(
                f"storage {ref.key} claims {ref.numel:,} elements, "
                f"its member holds {member.size:,} bytes"
            )
        return _StorageRef(dtype, member, ref.numel)

    value = torch_pickle.load(_content(window, members[root + "data.pkl"]), storage)
    tensors = _Tensors(file, window.start)
    absolute = {n: m._replace(offset=window.start + m.offset) for n, m in members.items()}
    return TorchFile(file, tensors.resolve(value), absolute)


def _content(window: _Window, member: Member) -> bytes:
    return window.get(member.offset, member.size)


def _find_end(window: _Window) -> tuple[int, int, int]:
    """(entries, size, offset) of the central directory. No comment: torch writes none."""
    if window.size < _END.size or window.get(0, 4) != b"PK\x03\x04":
        hint = ""
        head = window.get(0, min(2, window.size))
        if head[:1] == b"\x80":
            hint = "a pickle of torch before 1.6? save it again with a newer torch"
        raise UserError("not a torch zip file", hint)
    at = window.size - _END.size
    tag, disk, disk0, here, total, size, offset, comment = _END.unpack(window.get(at, _END.size))
    if tag != b"PK\x05\x06" or comment or disk or disk0 or here != total:
        raise UserError(
            "no zip directory at the end of the file", hint="the file is cut short or damaged"
        )
    if at >= _END64_LOCATOR.size:
        raw = window.get(at - _END64_LOCATOR.size, _END64_LOCATOR.size)
        tag, _, where, _ = _END64_LOCATOR.unpack(raw)
        if tag == b"PK\x06\x07":
            fields = _END64.unpack(window.get(where, _END64.size))
            if fields[0] != b"PK\x06\x06":
                raise UserError("zip64 directory is damaged")
            return fields[7], fields[8], fields[9]
    return total, size, offset


def _directory(window: _Window) -> Iterator[_Entry]:
    count, size, offset = _find_end(window)
    if size > MAX_DIRECTORY_BYTES or count * _ENTRY.size > size:
        raise UserError("zip directory is damaged")
    raw = window.get(offset, size)
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > size:
            raise UserError("zip directory is damaged")
        fields = _ENTRY.unpack_from(raw, at)
        tag, _, _, flags, method, _, _, crc, packed, full = fields[:10]
        name_len, extra_len, comment_len, disk, _, _, header = fields[10:]
        body = at + _ENTRY.size
        at = body + name_len + extra_len + comment_len
        if tag != b"PK\x01\x02" or disk or at > size:
            raise UserError("zip directory is damaged")
        name = raw[body : body + name_len].decode("utf-8", "replace")
        extra = raw[body + name_len : body + name_len + extra_len]
        full, packed, header = _zip64(extra, full, packed, header)
        yield _Entry(name, method, flags, crc, packed, full, header)
    if at != size:
        raise UserError("zip directory is damaged")


def _zip64(extra: bytes, full: int, packed: int, header: int) -> tuple[int, int, int]:
    """Replace 32-bit fields that are all ones by the zip64 extra field's, in its fixed order."""
    values = [full, packed, header]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == _ZIP64_EXTRA:
            block = extra[at + 4 : at + 4 + length]
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    if len(block) < 8:
                        raise UserError("zip directory is damaged")
                    values[i] = struct.unpack("<Q", block[:8])[0]
                    block = block[8:]
        at += 4 + length
    return values[0], values[1], values[2]


def _members(window: _Window, entries: list[_Entry]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    spans: list[tuple[int, int]] = []
    for entry in entries:
        if entry.name in members:
            raise UserError(f"zip member {entry.name!r} appears twice")
        if entry.method != 0 or entry.packed != entry.size or entry.flags & 1:
            raise UserError(
                f"zip member {entry.name!r} is compressed or encrypted: torch writes neither"
            )
        fields = _LOCAL.unpack(window.get(entry.header, _LOCAL.size))
        name_len, extra_len = fields[9], fields[10]
        name = window.get(entry.header + _LOCAL.size, name_len)
        if fields[0] != b"PK\x03\x04" or name.decode("utf-8", "replace") != entry.name:
            raise UserError(f"zip member {entry.name!r} has another local header")
        offset = entry.header + _LOCAL.size + name_len + extra_len
        if offset + entry.size > window.size:
            raise UserError(f"zip member {entry.name!r} runs past the end of the file")
        members[entry.name] = Member(offset, entry.size, entry.crc)
        spans.append((entry.header, offset + entry.size))
    spans.sort()
    for (_, end), (begin, _) in pairwise(spans):
        if end > begin:
            raise UserError("zip members overlap")
    return members


def _root(members: dict[str, Member]) -> str:
    roots = [n[: -len("data.pkl")] for n in members if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(roots) != 1 or not roots[0]:
        raise UserError(
            f"archive has {len(roots)} data.pkl members, not one: not a torch.save file"
        )
    if any(not name.startswith(roots[0]) for name in members):
        raise UserError("archive has members outside its root folder")
    return roots[0]


class _Tensors:
    """Replaces every ``Rebuild`` in the loaded object by a bounds-checked ``Array``."""

    def __init__(self, file: SourceFile, base: int) -> None:
        self.file, self.base = file, base
        self.done: dict[int, Any] = {}
        self.keep: list[Any] = []  # keeps originals alive so that ids stay unique

    def resolve(self, value: Any) -> Any:
        if not isinstance(value, dict | list | tuple | Call | Rebuild):
            return value
        key = id(cast(object, value))
        if key not in self.done:
            self.keep.append(value)
            self.done[key] = self._convert(value)
        return self.done[key]

    def _convert(self, value: Any) -> Any:
        if isinstance(value, Rebuild):
            return self._array(value)
        if isinstance(value, dict):
            items = cast("dict[Any, Any]", value).items()
            return {k: self.resolve(v) for k, v in items}
        if isinstance(value, list):
            return [self.resolve(v) for v in cast("list[Any]", value)]
        if isinstance(value, tuple) and not isinstance(value, _StorageRef):
            return tuple(self.resolve(v) for v in cast("tuple[Any, ...]", value))
        if isinstance(value, Call):
            value.args = self.resolve(value.args)
            value.state = self.resolve(value.state)
        return value

    def _array(self, tensor: Rebuild) -> Array:
        ref = tensor.storage
        if not isinstance(ref, _StorageRef):
            raise torch_pickle.PickleError("a tensor has no storage")
        shape, strides = _sizes(tensor.shape, "shape"), _sizes(tensor.strides, "stride")
        (offset,) = _sizes((tensor.offset,), "storage offset")
        if len(shape) != len(strides) or len(shape) > 16:
            raise torch_pickle.PickleError(f"a tensor has shape {shape} and strides {strides}")
        if math.prod(shape):
            last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            if last >= ref.numel:
                raise torch_pickle.PickleError(
                    f"a tensor of shape {list(shape)} reaches element {last:,} "
                    f"of a storage of {ref.numel:,}"
                )
        item = ref.dtype.itemsize
        start = self.base + ref.member.offset + offset * item
        steps = [s * item for s in strides]
        # A size-1 axis may carry any stride: give it the one that keeps the tensor contiguous.
        plain = contiguous_strides(shape, item)
        steps = [p if n == 1 else s for n, s, p in zip(shape, steps, plain, strict=True)]
        return from_file(self.file, start, shape, ref.dtype, steps)


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise torch_pickle.PickleError(f"a tensor's {what} is not a tuple")
    items = cast("tuple[Any, ...]", value)
    if not all(type(v) is int and 0 <= v < 1 << 63 for v in items):
        raise torch_pickle.PickleError(f"a tensor has the {what} {items}")
    return items


def check_crc(path: Path, members: dict[str, Member]) -> None:
    """Read every member and compare its CRC-32. Raises ``UserError`` naming the first bad one."""
    with path.open("rb") as file:
        for name, member in members.items():
            file.seek(member.offset)
            crc, left = 0, member.size
            while left:
                chunk = file.read(min(left, 8 << 20))
                if not chunk:
                    raise UserError(f"{path} is cut short")
                crc = crc32.of(chunk, crc)
                left -= len(chunk)
            if crc != member.crc:
                raise UserError(
                    f"{path}: CRC-32 of {name!r} is {crc:08x}, the archive says {member.crc:08x}",
                    hint="the file is damaged",
                )
