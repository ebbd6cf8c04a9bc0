"""JSON from elsewhere: bounded size, no duplicate keys, an object at the top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from fastllm_convert.errors import UserError

# transformers' own largest index (DeepSeek-V3, 91k tensors) is 9 MB; tokenizer.json reaches 20 MB.
MAX_JSON_BYTES = 200 << 20


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"key {twice!r} appears twice")
    return found


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Bytes → dict. Raises ``UserError`` naming ``where`` for anything but one JSON object."""
    try:
        value: object = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return cast("dict[str, Any]", value)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(
                f"{path} is larger than {MAX_JSON_BYTES >> 20} MB: not a config or index"
            )
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return parse_object(data, str(path))


def dump(value: object) -> bytes:
    """As transformers writes configs: two spaces, sorted keys, a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
