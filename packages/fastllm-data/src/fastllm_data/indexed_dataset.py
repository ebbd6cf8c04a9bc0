"""Megatron's indexed dataset on disk: read it, check it, write it.

Layout (little endian, packed): ``PREFIX.bin`` holds token ids and nothing else. ``PREFIX.idx``
holds magic (9 bytes), version (u64), dtype code (u8), number of sequences S (u64), number of
document boundaries D (u64), lengths (i32[S], tokens), offsets (i64[S], bytes), boundaries (i64[D],
sequences).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm_data.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
OBSOLETE_MAGIC = b"TNTIDX"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {
        1: "uint8",
        2: "int8",
        3: "int16",
        4: "int32",
        5: "int64",
        8: "uint16",
    }.items()
}
CHECK_ITEMS = 1 << 20  # sequences checked at a time, so that checking needs little memory


class IndexedDataset:
    """A dataset mapped into memory, read only; sequences are views of the file.

    ``lengths`` (int32[S], tokens), ``offsets`` (int64[S], bytes), ``boundaries`` (int64[D + 1],
    sequence numbers, for D documents), ``tokens`` (all ids, one after another).

    Everything that the index claims is checked on opening. Raises UserError naming file and place.
    """

    def __init__(self, prefix: str | Path, *, check: bool = True) -> None:
        self.prefix = Path(prefix)
        self.idx_path = self.prefix.with_name(self.prefix.name + ".idx")
        self.bin_path = self.prefix.with_name(self.prefix.name + ".bin")
        self.index_bytes = index = _map(self.idx_path)
        self.dtype, sequences, boundaries = self._read_header(index)
        at = HEADER.size
        self.lengths: NDArray[np.int32] = np.frombuffer(index, "<i4", sequences, at)
        at += 4 * sequences
        self.offsets: NDArray[np.int64] = np.frombuffer(index, "<i8", sequences, at)
        at += 8 * sequences
        self.boundaries: NDArray[np.int64] = np.frombuffer(index, "<i8", boundaries, at)
        self.data_bytes = data = _map(self.bin_path)
        if len(data) % self.dtype.itemsize:
            raise UserError(
                f"{self.bin_path}: {len(data)} bytes are not whole {self.dtype.name} tokens",
                "the file is cut short or belongs to another .idx",
            )
        self.tokens: NDArray[Any] = np.frombuffer(data, self.dtype)
        if check:
            self._check()

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self.prefix, "identity": self._identity()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"], check=False)  # as it was when the other process opened it
        if self._identity() != state["identity"]:
            raise UserError(f"{self.prefix}: the files have changed since they were opened")

    def _identity(self) -> list[tuple[int, int]]:
        found = [path.stat() for path in (self.idx_path, self.bin_path)]
        return [(info.st_size, info.st_mtime_ns) for info in found]

    @cached_property
    def lengths_sha256(self) -> str:
        """Hash of ``lengths``, which is all that indices for training depend on."""
        return sha256(self.lengths)

    def _read_header(self, index: mmap.mmap | bytes) -> tuple[np.dtype[Any], int, int]:
        path, size = self.idx_path, len(index)
        if index[: len(OBSOLETE_MAGIC)] == OBSOLETE_MAGIC:
            raise UserError(
                f"{path}: the obsolete 'cached' or 'lazy' format",
                "make the dataset again as 'mmap'",
            )
        if index[: len(MAGIC)] != MAGIC[: min(size, len(MAGIC))] or size == 0:
            raise UserError(
                f"{path}: byte 0: not a Megatron index file", "fastllm-data tokenize makes them"
            )
        if size < HEADER.size:
            raise UserError(f"{path}: cut short: {size} bytes, the header has {HEADER.size}")
        _, version, code, sequences, boundaries = HEADER.unpack_from(index)
        if version != 1:
            raise UserError(f"{path}: byte 9: version {version}, only 1 is known")
        if code not in DTYPES:
            raise UserError(f"{path}: byte 17: dtype code {code} holds no token ids")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        # Multimodal builders append one byte per sequence; those modes mean nothing here.
        if size not in (expected, expected + sequences):
            raise UserError(
                f"{path}: {size} bytes, but a header of {sequences} sequences and {boundaries} "
                f"document boundaries (bytes 18 to 33) means {expected}"
            )
        return DTYPES[code], sequences, boundaries

    def _check(self) -> None:
        path, sequences = self.idx_path, len(self.lengths)
        boundaries = self.boundaries
        lengths_at = HEADER.size
        offsets_at = lengths_at + 4 * sequences
        boundaries_at = offsets_at + 8 * sequences
        expected = 0
        for first in range(0, sequences, CHECK_ITEMS):
            lengths = self.lengths[first : first + CHECK_ITEMS].astype(np.int64)
            if (lengths < 0).any():
                i = first + int((lengths < 0).argmax())
                raise UserError(
                    f"{path}: byte {lengths_at + 4 * i}: sequence {i} has a negative length"
                )
            ends = expected + np.cumsum(lengths * self.dtype.itemsize)
            starts = np.concatenate([[expected], ends[:-1]])
            wrong = self.offsets[first : first + CHECK_ITEMS] != starts
            if wrong.any():
                i = first + int(wrong.argmax())
                raise UserError(
                    f"{path}: byte {offsets_at + 8 * i}: sequence {i} starts at "
                    f"{self.offsets[i]}, but the lengths before it end at {starts[i - first]}"
                )
            expected = int(ends[-1])
        if expected != self.tokens.nbytes:
            raise UserError(
                f"{self.bin_path}: {self.tokens.nbytes} bytes, but the index describes {expected}"
            )
        if len(boundaries) == 0 or boundaries[0] != 0:
            raise UserError(f"{path}: byte {boundaries_at}: document boundaries must start with 0")
        if boundaries[-1] != sequences:
            raise UserError(
                f"{path}: byte {boundaries_at + 8 * (len(boundaries) - 1)}: the last document "
                f"ends at sequence {boundaries[-1]} of {sequences}"
            )
        for first in range(0, len(boundaries) - 1, CHECK_ITEMS):
            part = boundaries[first : first + CHECK_ITEMS + 1]
            falling = part[1:] < part[:-1]
            if falling.any():
                i = first + int(falling.argmax()) + 1
                raise UserError(
                    f"{path}: byte {boundaries_at + 8 * i}: document boundary {i} is too low"
                )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """Number of documents; one may have no sequence, or several."""
        return len(self.boundaries) - 1

    def __getitem__(self, i: int) -> NDArray[Any]:
        """Sequence ``i``: a read-only view of the file."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        return self.get(i % len(self))

    def get(self, i: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """``length`` tokens of sequence ``i`` from token ``offset`` on (default: to its end)."""
        available = int(self.lengths[i])
        count = available - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > available:
            raise IndexError(f"tokens {offset}:{offset + count} of {available} in sequence {i}")
        start = int(self.offsets[i]) // self.dtype.itemsize + offset
        return self.tokens[start : start + count]

    def document(self, d: int) -> NDArray[Any]:
        """All tokens of document ``d``, its sequences one after another."""
        if not 0 <= d < self.documents:
            raise IndexError(f"document {d} of {self.documents}")
        first, last = int(self.boundaries[d]), int(self.boundaries[d + 1])
        if first == last:
            return self.tokens[:0]
        start = int(self.offsets[first]) // self.dtype.itemsize
        stop = (int(self.offsets[last - 1]) // self.dtype.itemsize) + int(self.lengths[last - 1])
        return self.tokens[start:stop]


def sha256(array: NDArray[Any]) -> str:
    """Of an array's bytes, in order."""
    return hashlib.sha256(np.ascontiguousarray(array).data.cast("B")).hexdigest()


def _map(path: Path) -> mmap.mmap | bytes:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file", "give the prefix: the path without .bin or .idx"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def write_index(
    path: Path, dtype: np.dtype[Any], lengths: NDArray[np.int32], boundaries: NDArray[np.int64]
) -> None:
    """Write an .idx. lengths: int32[S] of the sequences; boundaries: int64[documents + 1]."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    ends = np.cumsum(lengths.astype("<i8") * dtype.itemsize)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(boundaries)))
        file.write(lengths.astype("<i4").tobytes())
        file.write(np.concatenate([[0], ends])[: len(lengths)].astype("<i8").tobytes())
        file.write(boundaries.astype("<i8").tobytes())


class IndexedDatasetWriter:
    """Writes a dataset from Python, sequence by sequence; for tests, tools and small data.

    Use as a context manager: the files get their names when it ends without an error.
    """

    def __init__(self, prefix: str | Path, dtype: str = "uint16") -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._bin = self._temporary(".bin").open("wb")
        self._lengths = array("i")
        self._boundaries = array("q", [0])

    def _temporary(self, suffix: str) -> Path:
        return self.prefix.with_name(f".{self.prefix.name}{suffix}.{os.getpid()}")

    def add(self, ids: Sequence[int] | NDArray[Any]) -> None:
        """Append a sequence to the current document. Raises OverflowError for a bad id."""
        tokens = np.asarray(ids, dtype=np.int64)
        limits = np.iinfo(self.dtype)
        if len(tokens) and (tokens.min() < limits.min or tokens.max() > limits.max):
            raise OverflowError(f"an id does not fit {self.dtype.name}")
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._lengths.append(len(tokens))

    def end_document(self) -> None:
        self._boundaries.append(len(self._lengths))

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bin.close()
        if error is not None:
            self._temporary(".bin").unlink()
            return
        write_index(
            self._temporary(".idx"),
            self.dtype,
            np.array(self._lengths, dtype="<i4"),
            np.array(self._boundaries, dtype="<i8"),
        )
        for suffix in (".bin", ".idx"):
            self._temporary(suffix).replace(self.prefix.with_name(self.prefix.name + suffix))
