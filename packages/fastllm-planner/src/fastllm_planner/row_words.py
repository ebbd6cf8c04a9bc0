"""Cells of a table of published runs, as papers and logs spell them: numbers, switches, policies.

Every function takes the text of one cell and raises ``RowError`` for what it does not understand:
a row is never read as something it may not be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from fastllm_planner.layout import Dtype, Recompute

LARGEST = 2**53
SMALLEST = 1e-9
_YES = {"1", "1.0", "true", "yes", "y", "on", "t"}
_NO = {"0", "0.0", "false", "no", "n", "off", "none", "f", "-"}
_DTYPES: dict[str, Dtype] = {
    **dict.fromkeys(("bf16", "bfloat16", "mixedbf16", "bf16mixed", "ampbf16", "bf16amp"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "mixedfp16", "fp16mixed", "ampfp16"), "fp16"),
    **dict.fromkeys(("fp8", "float8", "mxfp8", "bf16fp8", "fp8bf16", "fp8mixed", "fp8cs"), "fp8"),
    **dict.fromkeys(("fp32", "float32"), "fp32"),
}


class RowError(ValueError):
    """Why a row cannot be used."""


def whole(cell: Mapping[str, str], key: str, default: int | None = None) -> int:
    """A positive whole number below 2**53; ``default`` where the cell is empty."""
    text = cell.get(key, "")
    if not text:
        if default is None:
            raise RowError(f"{key} is not given")
        return default
    try:
        value = float(text.replace(",", ""))
    except ValueError as error:
        raise RowError(f"{key}={text!r} is not a number") from error
    if not math.isfinite(value) or value >= LARGEST:
        raise RowError(f"{key}={text!r} is out of range")
    if value != int(value):
        raise RowError(f"{key}={text!r} is not a whole number")
    if value < 1:
        raise RowError(f"{key}={text!r} is not positive")
    return int(value)


def positive(cell: Mapping[str, str], key: str) -> float | None:
    """A positive finite number; None where the cell is empty."""
    text = cell.get(key, "").strip()
    if not text or text == "-":
        return None
    try:
        value = float(text.replace(",", ""))
    except ValueError as error:
        raise RowError(f"{key}={text!r} is not a number") from error
    if not SMALLEST <= value < LARGEST:
        raise RowError(f"{key}={text!r} is no measurement")
    return value


def switch(cell: Mapping[str, str], key: str, yes: str = "") -> bool | None:
    """On, off, or None where the cell is empty. ``yes``: a pattern of further words for "on"."""
    text = cell.get(key, "").strip().lower()
    if not text:
        return None
    if text in _NO:
        return False
    if text in _YES or (yes and re.fullmatch(yes, text)):
        return True
    raise RowError(f"{key}={text!r} is neither yes nor no")


def dtype(text: str) -> Dtype:
    """bf16 where nothing is said (every published run since 2021 that does not say is)."""
    words = re.sub(r"[^a-z0-9]", "", text.lower())
    if not words:
        return "bf16"
    if words not in _DTYPES:
        raise RowError(f"dtype {text} is not modelled")
    return _DTYPES[words]


def recompute(text: str, *, strict: bool) -> tuple[Recompute, float]:
    """Policy, and the share of the layers it covers. ``strict``: it has to be stated.

    "selective (every other layer)" and "selective (1/4 …)" recompute whole layers, some of them.
    """
    words = text.strip().lower()
    found = re.search(r"(\d+)\s*(?:/|of)\s*(\d+)", words)
    if words.startswith("selective") and "every other" in words:
        return "full", 0.5
    if words.startswith(("selective", "partial", "full", "block")) and found:
        return "full", min(1.0, int(found.group(1)) / max(1, int(found.group(2))))
    if words.startswith(("full", "uniform", "block", "all", "yes", "true")) or words == "1":
        return "full", 1.0
    if words.startswith(("selective", "sac", "core", "attention")):
        return "selective", 1.0
    if words in _NO or not strict:
        return "none", 1.0
    raise RowError("recompute is not given" if not words else f"recompute={text!r} is not known")


def zero_stage(text: str) -> int:
    """``dist-opt(1)``, ``fsdp(3)``, ``1+ (varies)``, ``ZeRO-2``, ``FSDP``, ``hsdp``, ``ddp``.

    A digit in parentheses is the stage, else what the words mean, else the first digit.
    """
    words = text.lower()
    if found := re.search(r"\((\d)\)", words):
        return _stage(found.group(1), text)
    if re.search(r"no_?shard|\bddp\b|^none$|^no$", words):
        return 0
    if re.search(r"grad_?op", words):
        return 2
    if re.search(r"[fh]sdp|full_?shard|hybrid_?shard", words):
        return 3
    if re.search(r"dist(ributed)?[-_ ]?opt", words):
        return 1
    if found := re.search(r"\d", words):
        return _stage(found.group(), text)
    raise RowError(f"zero_stage={text!r} is not known")


def _stage(digit: str, text: str) -> int:
    if digit not in "0123":
        raise RowError(f"zero_stage={text!r} is no ZeRO stage")
    return int(digit)


def shard_group(sharding: str, text: str, ranks: int, per_node: int) -> int:
    """Ranks over which states are sharded where that is not all of them, else 0.

    Hybrid sharding (HSDP) that states no size shards inside a node.
    """
    words = sharding.lower()
    found = re.search(r"(?:shard )?group (\d+)", words) or re.search(
        r"(?:zero1|shard|hsdp|sharding) (?:group|within node) \(?(\d+)", text.lower()
    )
    size = int(found.group(1)) if found else 0
    if not found and re.search(r"hsdp|hybrid_?shard", words):
        size = per_node
    return size if 0 < size < ranks and ranks % size == 0 else 0


def node_bandwidth(text: str) -> float | None:
    """Bytes/s that leave a node, where a text names it: ``4x100Gb``, ``1600 Gbps node``."""
    if found := re.search(r"(\d+)\s*x\s*(?:OmniPath\s*|IB\s*|EFA\s*)?(\d+)\s*Gb", text):
        return float(found.group(1)) * float(found.group(2)) * 1e9 / 8
    if found := re.search(r"(\d+)\s*Gb(?:ps|/s) node", text):
        return float(found.group(1)) * 1e9 / 8
    return None
