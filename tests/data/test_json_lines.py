"""The builder's JSON parser against Python's json.loads, on valid and on damaged lines."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_core import _core

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def expected(line: bytes) -> tuple[str, list[bytes]] | None:
    """What json.loads makes of ``text``: kind and texts; None if it refuses the line."""
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if "text" not in record:
        return "missing", []
    value = record["text"]
    if isinstance(value, str):
        return "text", [value.encode("utf-8", "surrogatepass")]
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return "list", [v.encode("utf-8", "surrogatepass") for v in value]
    return "other", []


def parsed(line: bytes) -> tuple[str, list[bytes]] | None:
    try:
        kind, texts, lone = _core.parse_json_line(line, ["text"])[0]
    except _core.JsonError:
        return None
    if kind in ("text", "list"):
        surrogates = any(re.search(rb"\xed[\xa0-\xbf]", text) for text in texts)
        assert lone == surrogates
        return kind, texts
    return kind, []


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text() | st.just("text"), VALUES), VALUES | st.text(), st.booleans())
def test_valid_lines(record: dict[str, Any], value: Any, ascii_only: bool) -> None:
    line = json.dumps({**record, "text": value}, ensure_ascii=ascii_only)
    try:
        raw = line.encode("utf-8")
    except UnicodeEncodeError:
        return
    assert expected(raw) is not None
    assert parsed(raw) == expected(raw)


def damage(line: bytes, rng: random.Random) -> bytes:
    """One to three bytes changed, removed, inserted, or a piece repeated."""
    data = bytearray(line)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1 if at < len(data):
                del data[at : at + rng.randint(1, 4)]
            case 2:
                data.insert(at, rng.choice(b'"\\{}[],:x0 \t\n\x00\xed\xc3'))
            case _:
                data[at:at] = data[at : at + rng.randint(1, 9)]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_lines(seed: int) -> None:
    rng = random.Random(seed)
    lines = [
        json.dumps(
            {"id": 1.5e3, "text": "plain and long enough for a vector, twice over", "b": [None]}
        ),
        json.dumps({"text": 'é\u2028\U0001f600 "quoted" \\ \n', "n": {"a": [True, False, -0]}}),
        json.dumps({"meta": {"text": "inner"}, "text": ["a", "b\u00e9"]}, ensure_ascii=False),
        '{"text": "\\ud83d\\ude00 \\ud83d x", "Infinity": -Infinity, "text2": NaN}',
    ]
    refused = 0
    for _ in range(2500):
        line = damage(rng.choice(lines).encode(), rng)
        if b"\n" in line:  # then it is two lines
            continue
        want = expected(line)
        assert parsed(line) == want, line
        refused += want is None
    assert refused > 1000


def test_long_lines() -> None:
    text = "0123456789" * 1_000_000 + "\\u00e9"
    line = ('{"text": "' + text + '"}').encode()
    assert parsed(line) == expected(line)
