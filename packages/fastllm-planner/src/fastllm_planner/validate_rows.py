"""Rows of a table of published runs → architecture, layout, cluster, backend and what was measured.

The columns are those of ``published_runs.csv``. Cells come from papers and logs, so that every one
may be missing: a row that cannot be read is skipped with its reason, never guessed at.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastllm_planner.arch import ArchError, ArchSpec
from fastllm_planner.backends import Backend, detect_backend
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import GIB, Cluster, Gpu, gpu
from fastllm_planner.layout import Layout, Recompute

MemoryKind = Literal["allocated", "reserved", "device", "oom", "none"]
REQUIRED_COLUMNS = ("series", "layers", "hidden", "gpu", "n_gpus", "global_batch", "complete")
# ``complete``: 2 where architecture, layout, batch and recomputation are all known
FULLY_KNOWN = 2.0


@dataclass(frozen=True)
class Row:
    """One published run. ``seconds`` and ``memory_bytes`` are None where nothing was measured."""

    id: str
    series: str
    model: str
    spec: ArchSpec
    layout: Layout
    cluster: Cluster
    backend: Backend
    complete: bool
    seconds: float | None
    memory_bytes: float | None
    memory_kind: MemoryKind

    @property
    def out_of_memory(self) -> bool:
        return self.memory_kind == "oom"


class RowError(ValueError):
    """Why a row cannot be used."""


def read_rows(path: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """All usable rows, and (id, reason) of the others. ``UserError`` for another kind of file."""
    try:
        with path.open(encoding="utf-8", newline="") as handle:
            reader = csv.DictReader(handle)
            names = reader.fieldnames or []
            missing = [name for name in REQUIRED_COLUMNS if name not in names]
            if missing:
                raise UserError(
                    f"{path} is not a table of runs: no column {missing[0]!r}",
                    hint="the columns are described in docs/planner-accuracy.md",
                )
            cells = list(reader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file: {error}") from error
    rows: list[Row] = []
    skipped: list[tuple[str, str]] = []
    for number, raw in enumerate(cells, start=2):
        cell = {key: (value or "").strip() for key, value in raw.items() if isinstance(key, str)}
        name = cell.get("id") or f"line {number}"
        try:
            rows.append(_row(name, cell))
        except (RowError, ArchError, UserError) as error:
            skipped.append((name, str(error)))
    return rows, skipped


def _row(name: str, cell: Mapping[str, str]) -> Row:
    text = " ".join(cell.get(key, "") for key in ("series", "source", "notes"))
    sharding = cell.get("zero_stage", "")
    flash = cell.get("flash", "") != "0"
    backend = detect_backend(text, sharding, flash=flash, pp=_int(cell, "pp", 1))
    spec = _spec(cell)
    layout = _layout(cell, spec, sharding or str(backend.default_zero_stage), text, flash)
    memory, kind = _memory(cell)
    return Row(
        id=name,
        series=cell["series"],
        model=cell.get("model_name", ""),
        spec=spec,
        layout=layout,
        cluster=_cluster(cell, text, layout),
        backend=backend,
        complete=(_float(cell, "complete") or 0.0) >= FULLY_KNOWN,
        seconds=_seconds(cell, layout),
        memory_bytes=memory,
        memory_kind=kind,
    )


def _int(cell: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = cell.get(key, "")
    if not text:
        if default is None:
            raise RowError(f"{key} is not given")
        return default
    try:
        value = int(float(text))
    except ValueError as error:
        raise RowError(f"{key}={text!r} is not a number") from error
    if value < 1:
        raise RowError(f"{key}={text!r} is not positive")
    return value


def _float(cell: Mapping[str, str], key: str) -> float | None:
    try:
        value = float(cell.get(key, ""))
    except ValueError:
        return None
    return value if value > 0 else None


def _spec(cell: Mapping[str, str]) -> ArchSpec:
    """Dense decoder from the table's dimensions.

    GELU means GPT: biases, LayerNorm, learned positions. An MLP that is not named is GELU at four
    times the hidden size and gated at any other width.
    """
    hidden, heads = _int(cell, "hidden"), _int(cell, "heads")
    width = _int(cell, "ffn_hidden")
    mlp = cell.get("mlp") or ("gelu" if width == 4 * hidden else "swiglu")
    gated, gpt = mlp not in ("gelu", "relu", "relu2"), mlp == "gelu"
    return ArchSpec(
        family="gpt2" if gpt else "llama",
        layers=_int(cell, "layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_int(cell, "kv_heads", heads),
        head_dim=2 * round(hidden / heads / 2),
        ffn_hidden=width,
        vocab=_int(cell, "vocab"),
        max_seq_len=_int(cell, "seq_len"),
        mlp="swiglu" if gated else "gelu",
        norm="layernorm" if gpt else "rmsnorm",
        position="learned" if gpt else "rope",
        qkv_bias=gpt,
        attention_out_bias=gpt,
        mlp_bias=gpt,
        tied_embeddings=cell.get("tied_emb", "") == "1",
    )


def _layout(
    cell: Mapping[str, str], spec: ArchSpec, sharding: str, text: str, flash: bool
) -> Layout:
    tp, pp = _int(cell, "tp", 1), _int(cell, "pp", 1)
    cp, ep = _int(cell, "cp", 1), _int(cell, "ep", 1)
    devices = _int(cell, "n_gpus")
    # Where the table disagrees with itself, the number of devices is what was counted.
    dp = max(1, devices // (tp * pp * cp))
    dtype = (cell.get("dtype") or "bf16").removeprefix("mx")
    if dtype not in ("bf16", "fp16", "fp32", "fp8"):
        raise RowError(f"dtype {dtype} is not modelled")
    recompute, share = _recompute(cell.get("recompute", ""))
    ranks = dp * cp
    return Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        virtual_stages=_int(cell, "interleave", 1),
        cp=cp,
        ep=ep,
        zero_stage=_zero_stage(sharding),
        micro_batch=_int(cell, "micro_batch"),
        global_batch=_int(cell, "global_batch"),
        seq_len=_int(cell, "seq_len"),
        recompute=recompute,
        recompute_share=share,
        sequence_parallel=tp > 1 and _sequence_parallel(cell, flash),
        dtype=dtype,
        flash=flash,
        shard_group=_shard_group(sharding, text, ranks),
    )


def _sequence_parallel(cell: Mapping[str, str], flash: bool) -> bool:
    """As stated; if not, assume it with flash attention (stacks of 2023 on switch it on)."""
    stated = cell.get("sp", "")
    return stated == "1" if stated else flash


def _recompute(text: str) -> tuple[Recompute, float]:
    if text.startswith("selective") and "every other" in text:
        return "full", 0.5
    if text.startswith("selective") and (found := re.search(r"(\d+)\s*/\s*(\d+)", text)):
        return "full", min(1.0, int(found.group(1)) / max(1, int(found.group(2))))
    for kind in ("full", "selective"):
        if text.startswith(kind):
            return kind, 1.0
    return "none", 1.0


def _zero_stage(text: str) -> int:
    """``dist-opt(1)``, ``fsdp(3)``, ``1+ (varies)``, ``2``: digit in parentheses, or the first."""
    found = re.search(r"\((\d)\)", text) or re.search(r"(?<!fsdp)\d", text)
    if found is None:
        return 3 if "sdp" in text else 1 if "dist" in text else 0
    return min(3, int(found.group(found.lastindex or 0)))


def _shard_group(sharding: str, text: str, ranks: int) -> int:
    found = re.search(r"(?:shard )?group (\d+)", sharding) or re.search(
        r"(?:zero1|shard|hsdp|sharding) (?:group|within node) \(?(\d+)", text
    )
    size = int(found.group(1)) if found else 0
    return size if 0 < size < ranks and ranks % size == 0 else 0


def _device(name: str) -> Gpu:
    """The board by its name, or by the name without its last parts ("H100-96G-HBM2e-500W")."""
    parts = name.split("-")
    for length in range(len(parts), 1, -1):
        try:
            return gpu("-".join(parts[:length]))
        except UserError:
            continue
    return gpu(parts[0])


def _cluster(cell: Mapping[str, str], text: str, layout: Layout) -> Cluster:
    device = _device(cell["gpu"].rstrip("?"))
    per_node = _int(cell, "gpus_per_node", 8)
    node_gbit: float | None = None
    if found := re.search(r"(\d+)\s*x\s*(?:OmniPath\s*|IB\s*|EFA\s*)?(\d+)\s*Gb", text):
        node_gbit = float(found.group(1)) * float(found.group(2))
    elif found := re.search(r"(\d+)\s*Gb(?:ps|/s) node", text):
        node_gbit = float(found.group(1))
    bandwidth = node_gbit * 1e9 / 8 / per_node if node_gbit else None
    return Cluster(device, layout.world_size, per_node, bandwidth)


def _seconds(cell: Mapping[str, str], layout: Layout) -> float | None:
    for key in ("iter_time_best_s", "iter_time_s", "iter_time_derived_s"):
        if (seconds := _float(cell, key)) is not None:
            return seconds
    rate = _float(cell, "tokens_per_s_per_gpu")
    if rate is None:
        return None
    return layout.global_batch * layout.seq_len / (rate * layout.world_size)


def _memory(cell: Mapping[str, str]) -> tuple[float | None, MemoryKind]:
    """Peak in bytes and what it counts: torch's tensors, its cache, or all of the device."""
    kind = cell.get("mem_kind", "")
    if kind.upper().startswith("OOM"):
        return None, "oom"
    value = _float(cell, "peak_mem_gib")
    if value is None:
        return None, "none"
    words = kind.lower()
    if "reserved" in words:
        return value * GIB, "reserved"
    allocated = "alloc" in words or "torch" in words
    return value * GIB, "allocated" if allocated else "device"
