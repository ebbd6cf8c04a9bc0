"""Inputs as pieces of lines for the builder: bytes as they are, or other formats as lines of JSON.

Each reader yields ``(piece, position)``. A position that is not None ends a line, and is what
``start`` must be to go on after it: bytes of the decompressed content, or rows, or files.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastllm_data.errors import UserError
from fastllm_data.inputs import COMPRESSED, Source
from fastllm_data.streams import CHUNK, Meter, open_source, skip_bytes

Piece = tuple[bytes, int | None]
SplitText = Callable[[str], list[str]]


def pieces(
    source: Source, keys: tuple[str, ...], start: int, meter: Meter, split: SplitText | None = None
) -> Iterator[Piece]:
    """The lines of an input from ``start`` on. split: cuts each text into sentences."""
    if source.format == "parquet":
        from fastllm_data.parquet import parquet_pieces

        found = parquet_pieces(source, keys, start, meter)
    elif source.format == "text-file":
        found = file_pieces(source, keys[0], start, meter)
    elif source.format == "text-paragraph":
        found = paragraph_pieces(source, keys[0], start, meter)
    elif source.format == "text-line" and split is not None:
        found = text_line_pieces(source, keys[0], start, meter)
    else:
        found = byte_pieces(source, start, meter)
    return found if split is None else _split_texts(found, keys, split)


def json_lines(
    source: Source, keys: tuple[str, ...], meter: Meter | None = None
) -> Iterator[bytes]:
    """Each document of an input as a line of JSON, without its end."""
    meter = meter or Meter()
    if source.format == "text-line":
        found = text_line_pieces(source, keys[0], 0, meter)
    else:
        found = pieces(source, keys, 0, meter)
    rest = b""
    for piece, _ in found:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def byte_pieces(source: Source, start: int, meter: Meter) -> Iterator[Piece]:
    """The bytes of an input whose lines the builder takes as they are."""
    with open_source(source, meter) as stream:
        skip_bytes(stream, start, source)
        at = start
        while chunk := stream.read(CHUNK):
            newline = chunk.rfind(b"\n") + 1
            if newline:
                yield chunk[:newline], at + newline
            if newline < len(chunk):
                yield chunk[newline:], None
            at += len(chunk)


def json_line(key: str, text: bytes) -> bytes:
    """One line of JSON that holds a text. Bytes that are not UTF-8 stay: the builder finds them."""
    encoded = json.dumps({key: text.decode("utf-8", "surrogateescape")}, ensure_ascii=False)
    return encoded.encode("utf-8", "surrogateescape") + b"\n"


def _gather(lines: Iterator[tuple[bytes, int]]) -> Iterator[Piece]:
    """Lines in pieces of about CHUNK bytes."""
    held: list[bytes] = []
    size, at = 0, None
    for line, at in lines:
        held.append(line)
        size += len(line)
        if size >= CHUNK:
            yield b"".join(held), at
            held, size = [], 0
    if held:
        yield b"".join(held), at


def text_line_pieces(source: Source, key: str, start: int, meter: Meter) -> Iterator[Piece]:
    """Each line of a text as a line of JSON."""

    def lines() -> Iterator[tuple[bytes, int]]:
        with open_source(source, meter) as stream:
            skip_bytes(stream, start, source)
            at = start
            for line in stream:
                at += len(line)
                text = line.removesuffix(b"\n").removesuffix(b"\r")
                yield json_line(key, _without_mark(text, at == len(line))), at

    return _gather(lines())


def paragraph_pieces(source: Source, key: str, start: int, meter: Meter) -> Iterator[Piece]:
    """Each run of lines that are not blank as a line of JSON, without its last line end."""

    def lines() -> Iterator[tuple[bytes, int]]:
        with open_source(source, meter) as stream:
            skip_bytes(stream, start, source)
            at = start
            held: list[bytes] = []
            for line in stream:
                line_text = _without_mark(line, at == 0)
                at += len(line)
                if line_text.strip():
                    held.append(line_text)
                elif held:
                    yield json_line(key, _paragraph(held)), at
                    held = []
            if held:
                yield json_line(key, _paragraph(held)), at

    return _gather(lines())


def _paragraph(lines: list[bytes]) -> bytes:
    return b"".join(lines).removesuffix(b"\n").removesuffix(b"\r")


def _without_mark(text: bytes, first: bool) -> bytes:
    return text.removeprefix(b"\xef\xbb\xbf") if first else text


def file_pieces(source: Source, key: str, start: int, meter: Meter) -> Iterator[Piece]:
    """Each file as a line of JSON; positions are numbers of files."""

    def lines() -> Iterator[tuple[bytes, int]]:
        for number, name in enumerate(source.files[start:], start + 1):
            kind = COMPRESSED.get(Path(name).suffix, "plain")
            with open_source(Source(name, kind, 0, "text-file"), meter) as stream:
                yield json_line(key, _without_mark(stream.read(), True)), number

    return _gather(lines())


def _split_texts(
    found: Iterator[Piece], keys: tuple[str, ...], split: SplitText
) -> Iterator[Piece]:
    rest = b""
    for piece, at in found:
        rest += piece
        if at is None:
            continue
        yield b"".join(_split_line(line, keys, split) for line in rest.splitlines(True)), at
        rest = b""
    if rest:
        yield _split_line(rest, keys, split), None


def _split_line(line: bytes, keys: tuple[str, ...], split: SplitText) -> bytes:
    """A line of JSON with lists of sentences for texts. Bad ones stay, for the builder to find."""
    try:
        record: Any = json.loads(line)
        for key in keys:
            if isinstance(record[key], str):
                record[key] = split(record[key])
        content = {key: record[key] for key in keys}
        return json.dumps(content, ensure_ascii=False).encode() + b"\n"
    except (ValueError, KeyError, TypeError):
        return line


def sentence_splitter(language: str, keep_newlines: bool) -> SplitText:
    """NLTK's Punkt, as Megatron's ``--split-sentences`` (the extra ``fastllm-data[sentences]``).

    keep_newlines: white space after a sentence stays with it. Raises UserError without the data.
    """
    try:
        punkt: Any = importlib.import_module("nltk.tokenize.punkt")
    except ImportError as error:
        raise UserError(
            "--split-sentences needs NLTK", "pip install 'fastllm-data[sentences]'"
        ) from error
    try:
        splitter: Any = punkt.PunktTokenizer(language)
    except LookupError as error:
        raise UserError(
            f"--split-sentences: NLTK has no sentence data for {language!r}",
            f"{Path(sys.executable).name} -m nltk.downloader punkt_tab",
        ) from error

    def split(text: str) -> list[str]:
        spans: list[tuple[int, int]] = list(splitter.span_tokenize(text))
        if not keep_newlines:
            return [text[begin:end] for begin, end in spans]
        ends = [begin for begin, _ in spans[1:]] + [len(text)]
        begins = [0, *ends[:-1]]
        return [text[begin:end] for begin, end in zip(begins, ends, strict=True)] if spans else []

    return split
