"""How inputs reach the builder, and samples of them for comparing encoders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, cast

from fastllm_core import DatasetBuilder
from fastllm_data.documents import SplitText, pieces
from fastllm_data.inputs import Source
from fastllm_data.streams import CHUNK, Meter, open_source

# Of one text: the reference library needs a second for a few million, and much memory.
SAMPLE_CHARACTERS = 1 << 16


def add_source(
    builder: DatasetBuilder,
    source: Source,
    keys: tuple[str, ...],
    at: tuple[int, int],
    step: int,
    meter: Meter,
    split: SplitText | None = None,
) -> Iterator[tuple[int, int]]:
    """Hand the documents of one input to the builder, from position and line ``at`` on.

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


def sample_texts(
    source: Source, keys: tuple[str, ...], count: int, split: SplitText | None = None
) -> list[str]:
    """About ``count`` texts spread over an input, for comparing encoders.

    Of compressed inputs and other formats than lines, the first ones. Lines that are not what they
    should be are passed over here: the builder reports them.
    """
    if source.kind in ("stdin", "pipe"):
        return []
    if not source.divisible:
        return _first_texts(source, keys, count, split)
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


def _first_texts(
    source: Source, keys: tuple[str, ...], count: int, split: SplitText | None
) -> list[str]:
    texts: list[str] = []
    form = "jsonl" if split or source.format != "text-line" else "text-line"
    few = replace(source, files=source.files[:count])
    for piece, _ in islice(pieces(few, keys, 0, Meter(), split), 2):
        for line in piece.split(b"\n")[: count - len(texts)]:
            texts.extend(_texts(line, keys, form))
        if len(texts) >= count:
            break
    return texts


def _texts(line: bytes, keys: tuple[str, ...], form: str) -> Iterator[str]:
    try:
        if form == "text-line":
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode()[:SAMPLE_CHARACTERS]
            return
        record: Any = json.loads(line)
        for key in keys:
            value: Any = record[key]
            texts = cast(list[Any], value) if isinstance(value, list) else [value]
            for text in texts:
                text.encode()  # a lone surrogate is no text
                yield text[:SAMPLE_CHARACTERS]
    except (ValueError, KeyError, TypeError, AttributeError):
        return
