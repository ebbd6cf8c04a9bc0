"""Which inputs there are: files, globs, folders, standard input, URLs; and what kind each is."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm_data import remote
from fastllm_data.errors import UserError

# What a document is. Only the first two can be told from the input.
FORMATS = ("jsonl", "parquet", "text-line", "text-paragraph", "text-file")
LINES = ("jsonl", "text-line")  # one document a line: the native reader takes these as they are

COMPRESSED = {".gz": "gz", ".zst": "zst"}
MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PAR1": "parquet"}
# Taken from a folder, compressed or not; with a text format every file is.
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")


@dataclass(frozen=True)
class Source:
    """One input, or a part of one.

    kind: ``plain``, ``gz``, ``zst`` (files and URLs), ``pipe``, ``stdin``, or ``list``: many whole
    files of one document each, read as one input.
    format: one of FORMATS. size: bytes on disk, compressed; 0 if unknown.
    begin, end: the part's bytes, for a plain local file of lines; a part owns the lines that start
    in it.
    """

    name: str
    kind: str
    size: int
    format: str = "jsonl"
    modified: str = ""  # time of last change, or a remote file's version
    begin: int = 0
    end: int | None = None
    files: tuple[str, ...] = ()

    @property
    def remote(self) -> bool:
        return remote.is_url(self.name)

    @property
    def divisible(self) -> bool:
        """Whether the native reader can start at any byte of it."""
        return self.kind == "plain" and self.format in LINES and not self.remote

    @property
    def stop(self) -> int:
        """Where its bytes end."""
        return self.size if self.end is None else self.end

    def describe(self) -> dict[str, Any]:
        """What the sidecar records."""
        said: dict[str, Any] = {
            "file": self.name,
            "kind": self.kind,
            "format": self.format,
            "bytes": self.size,
        }
        if self.files:
            said["files"] = len(self.files)
        if (self.begin, self.end) != (0, None):
            said["part"] = [self.begin, self.end]
        return said

    def identity(self) -> list[Any]:
        """What must be the same for a stopped run to go on with it."""
        said = {**self.describe(), "file": _absolute(self.name)}
        return [said, self.modified, [_absolute(name) for name in self.files]]


def _absolute(name: str) -> str:
    return name if remote.is_url(name) else str(Path(name).absolute())


def find_sources(patterns: tuple[str, ...], form: str = "auto") -> list[Source]:
    """Expand files, globs, folders, URLs and ``-`` (standard input), in the order given.

    The files of a glob or folder come by name. form: one of FORMATS, or ``auto``: JSONL or Parquet
    by name and content. Raises UserError for what is not there or cannot be read.
    """
    sources: list[Source] = []
    for pattern in patterns:
        if pattern == "-":
            sources.append(_stdin(form))
        elif remote.is_url(pattern):
            sources.extend(_remote(pattern, form))
        else:
            sources.extend(_local(path, form) for path in _matches(pattern, form))
    return _as_lists(sources)


def _stdin(form: str) -> Source:
    if form in ("parquet", "text-file"):
        raise UserError(f"standard input cannot be {form}", "write it to a file first")
    return Source("standard input", "stdin", 0, _format_of("", form))


def _matches(pattern: str, form: str) -> Iterator[Path]:
    path = Path(pattern)
    # A glob that matches is for shells that did not expand it; a real name wins.
    if path.is_dir():
        yield from _folder(path, form)
    elif path.exists():
        yield path
    else:
        found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
        if not found:
            raise UserError(
                f"{pattern}: no such file",
                "inputs are files, globs in quotes, folders, URLs, or - for standard input",
            )
        for match in map(Path, found):
            if match.is_dir():
                yield from _folder(match, form)
            else:
                yield match


def _folder(folder: Path, form: str) -> list[Path]:
    """The files in a folder and in those below it that hold documents, by name."""
    files: list[Path] = []
    for where, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        files += [Path(where) / name for name in names if not name.startswith(".")]
    wanted = sorted(path for path in files if _in_folder(path, form))
    if not wanted:
        kinds = "files" if form.startswith("text") else "JSONL or Parquet files"
        raise UserError(f"{folder}: no {kinds} in this folder", "name them, or give --format")
    if len(wanted) < len(files):
        passed = sorted(set(files) - set(wanted))
        print(
            f"note: {folder}: {len(passed)} other files are passed over, like {passed[0]}",
            file=sys.stderr,
        )
    return wanted


def _in_folder(path: Path, form: str) -> bool:
    if form.startswith("text"):
        return True
    bare = path.with_suffix("") if path.suffix in COMPRESSED else path
    suffixes = {"jsonl": JSONL_SUFFIXES, "parquet": (".parquet",)}
    return bare.suffix in suffixes.get(form, (*JSONL_SUFFIXES, ".parquet"))


def _local(path: Path, form: str) -> Source:
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read", "check its permissions")
    info = path.stat()
    if not path.is_file():
        return Source(str(path), "pipe", 0, _format_of(path.name, form))
    with path.open("rb") as file:
        start = file.read(4)
    known = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), "plain")
    kind = COMPRESSED.get(path.suffix, known)
    if kind == "parquet":
        kind = "plain"
        form = "parquet" if form == "auto" else form
    return Source(str(path), kind, info.st_size, _format_of(path.name, form), str(info.st_mtime_ns))


def _remote(url: str, form: str) -> Iterator[Source]:
    for found in remote.expand(url):
        name = found.url.split("?")[0]
        kind = COMPRESSED.get(Path(name).suffix, "plain")
        yield Source(found.url, kind, found.size, _format_of(name, form), found.version)


def _format_of(name: str, form: str) -> str:
    if form != "auto":
        return form
    path = Path(name)
    bare = path.with_suffix("") if path.suffix in COMPRESSED else path
    if bare.suffix == ".parquet":
        return "parquet"
    if bare.suffix in TEXT_SUFFIXES:
        raise UserError(
            f"{name}: plain text does not say where a document ends",
            "--format text-line, text-paragraph (blank lines between) or text-file (one each)",
        )
    return "jsonl"


def _as_lists(sources: list[Source]) -> list[Source]:
    """Neighbouring files of one document each become one input, so that they are read as one."""
    joined: list[Source] = []
    group: list[Source] = []

    def close() -> None:
        if group:
            joined.append(
                Source(
                    name=group[0].name,
                    kind="list",
                    size=sum(s.size for s in group),
                    format="text-file",
                    modified=" ".join(s.modified for s in group),
                    files=tuple(s.name for s in group),
                )
            )
            group.clear()

    for source in sources:
        if source.format == "text-file":
            group.append(source)
        else:
            close()
            joined.append(source)
    close()
    return joined
