"""What will be written: files, and the place in them of every tensor. No byte is read for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm_convert.arrays import Array, SourceFile
from fastllm_convert.dtypes import DType

if TYPE_CHECKING:
    from fastllm_convert.files.torch_zip import Member


@dataclass(frozen=True, slots=True)
class Piece:
    """``array``, stored as ``dtype`` at byte ``offset`` of its file."""

    label: str
    offset: int
    array: Array
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.array.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class OutputFile:
    """``literals`` are (offset, bytes). ``finish``, when given, gets the CRC-32 of every piece, in
    order, and returns the literals that need them (zip headers)."""

    path: str
    size: int
    pieces: tuple[Piece, ...] = ()
    literals: tuple[tuple[int, bytes], ...] = ()
    finish: Callable[[Sequence[int]], list[tuple[int, bytes]]] | None = None


@dataclass(frozen=True)
class Plan:
    """A folder to write. ``checked`` and ``equal``: see ``Checkpoint``."""

    files: Sequence[OutputFile]
    sources: Sequence[SourceFile]
    checked: Sequence[tuple[SourceFile, Member]] = ()
    equal: Sequence[tuple[str, Array, Array]] = ()
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def bytes_written(self) -> int:
        return sum(f.size for f in self.files)

    @property
    def bytes_read(self) -> int:
        return sum(p.array.nbytes for f in self.files for p in f.pieces)

    @property
    def tensors(self) -> int:
        return sum(len(f.pieces) for f in self.files)

    def fingerprint(self) -> str:
        """Equal for two plans that write the same bytes from unchanged files (for resuming)."""
        digest = hashlib.sha256(b"fastllm-convert plan 1\n")
        for source in sorted(self.sources, key=lambda s: str(s.path)):
            stat = source.path.stat()
            digest.update(f"{source.path.resolve()} {source.size} {stat.st_mtime_ns}\n".encode())
        for file in self.files:
            digest.update(f"{file.path} {file.size}\n".encode())
            for piece in file.pieces:
                shape, kind = piece.array.shape, piece.array.dtype.code
                digest.update(
                    f"{piece.label} {piece.offset} {shape} {kind} {piece.dtype}\n".encode()
                )
            for offset, literal in file.literals:
                digest.update(b"%d " % offset + literal)
        return digest.hexdigest()


def literal_file(path: str, content: bytes) -> OutputFile:
    """A small file that is ready."""
    return OutputFile(path, len(content), literals=((0, content),))


def sources_of(arrays: Sequence[Array]) -> list[SourceFile]:
    """The files some arrays point into."""
    found: dict[Path, SourceFile] = {}
    for array in arrays:
        for box in array.compact.boxes():
            if box.file is not None:
                found[box.file.path] = box.file
    return list(found.values())
