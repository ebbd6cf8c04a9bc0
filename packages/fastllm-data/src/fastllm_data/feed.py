"""How inputs reach the builder, and samples of them for comparing encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from fastllm_core import DatasetBuilder, JsonError, parse_json_line
from fastllm_data.documents import SplitText, pieces
from fastllm_data.inputs import Source
from fastllm_data.streams import CHUNK, Meter, open_source

# Of one text: the reference library needs a second for a few million, and much memory.
SAMPLE_BYTES = 1 << 17


def add_source(
    builder: DatasetBuilder,
    source: Source,
    keys: tuple[str, ...],
    at: tuple[int, int],
    step: int,
    meter: Meter,
    split: SplitText | None = None,
    tap: Callable[[bytes], None] | None = None,
) -> Iterator[tuple[int, int]]:
    """Hand the documents of one input to the builder, from position and line ``at`` on.

    tap: is shown the pieces of an input that is read front to back.

    After about every ``step`` bytes, when all lines so far are written, yields the position and
    line from which a later call can go on.
    """
    position, line = at
    if source.divisible and split is None:
        yield from _add_file(builder, source, position, line, step, meter)
        return
    builder.begin_stream(source.name, line)
    fed = 0
    for piece, reached in pieces(source, keys, position, meter, split):
        if tap is not None:
            tap(piece)
        builder.feed(piece)
        fed += len(piece)
        if reached is not None and fed >= step:
            builder.end_stream()
            yield reached, builder.lines_in_source
            builder.begin_stream(source.name, builder.lines_in_source)
            fed = 0
    builder.end_stream()


def _add_file(
    builder: DatasetBuilder, source: Source, offset: int, line: int, step: int, meter: Meter
) -> Iterator[tuple[int, int]]:
    # A segment owns the lines that start in it, so any offset is a good one to go on from.
    offset = max(offset, source.begin)
    while offset < source.stop:
        end = min(source.stop, offset + step)
        meter.native_from = builder.counts()["input_bytes"]
        builder.add_file(source.name, offset, end, line)
        meter.native_from = None
        meter.bytes += end - offset
        offset, line = end, builder.lines_in_source
        yield offset, line


def sample_texts(source: Source, keys: tuple[str, ...], count: int) -> list[str]:
    """About ``count`` texts spread over a divisible input, for comparing encoders.

    Lines that are not what they should be are passed over here: the builder reports them.
    """
    texts: list[str] = []
    with open_source(source) as stream:
        for i in range(count):
            start = source.begin + (source.stop - source.begin) * i // count
            if start > 0:
                stream.seek(start - 1)
                stream.readline()
            line = stream.readline(CHUNK)
            if line:
                texts.extend(_texts(line, keys, source.format))
    return texts


def texts_of(piece: bytes, keys: tuple[str, ...], count: int, form: str) -> list[str]:
    """About ``count`` texts of the first lines of a piece, as ``sample_texts``."""
    texts: list[str] = []
    for line in piece.split(b"\n", count)[:count]:
        texts.extend(_texts(line, keys, form))
    return texts


def _texts(line: bytes, keys: tuple[str, ...], form: str) -> Iterator[str]:
    if form == "text-line":
        text = line.removesuffix(b"\n").removesuffix(b"\r")
        with suppress(UnicodeDecodeError):
            yield _decode(text[:SAMPLE_BYTES], cut=len(text) > SAMPLE_BYTES)
        return
    try:
        fields = parse_json_line(line, list(keys), SAMPLE_BYTES)
    except JsonError:
        return
    if all(kind in ("text", "list") and not surrogate for kind, _, surrogate in fields):
        for _, texts, _ in fields:
            yield from (_decode(text, cut=len(text) == SAMPLE_BYTES) for text in texts)


def _decode(text: bytes, *, cut: bool) -> str:
    """The text; of one that is cut off, without what may be a part of a character."""
    return text.decode() if not cut else text.decode(errors="ignore")
