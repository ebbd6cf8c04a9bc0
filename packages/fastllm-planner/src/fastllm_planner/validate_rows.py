"""Rows of a table of published runs → architecture, layout, cluster, backend and what was measured.

The columns are those of ``published_runs.csv``. Cells come from papers and logs, so that every one
may be missing: a row that cannot be read is skipped with its reason, never guessed at.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastllm_planner.arch import ArchError, ArchSpec, count_params
from fastllm_planner.backends import Backend, detect_backend
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import GIB, Cluster, gpu
from fastllm_planner.layout import Layout
from fastllm_planner.row_words import (
    RowError,
    dtype,
    node_bandwidth,
    positive,
    recompute,
    shard_group,
    switch,
    whole,
    zero_stage,
)

MemoryKind = Literal["allocated", "reserved", "device", "oom", "none"]
REQUIRED_COLUMNS = (
    *("series", "layers", "hidden", "heads", "ffn_hidden", "vocab", "seq_len"),
    *("gpu", "n_gpus", "micro_batch", "global_batch", "complete"),
)
OUT_OF_MEMORY = re.compile(r"\boom\b|out[- ]of[- ]memory", re.IGNORECASE)
# A table states dense models by their dimensions; this many times more or fewer parameters than
# those have say that it is another model (small ones are told without embeddings: 0.7 times).
SAME_PARAMETERS = 2.0
# ``complete``: 2 where architecture, layout, batch and recomputation are all known
FULLY_KNOWN = 2.0
GATED_MLPS = ("swiglu", "geglu", "reglu", "glu", "silu", "gated")
PLAIN_MLPS = ("gelu", "relu", "relu2", "squared_relu", "squared-relu")


@dataclass(frozen=True)
class Row:
    """One published run. ``seconds`` and ``memory_bytes`` are None where nothing was measured.

    ``backend_named``: the row names its stack; otherwise ``backend`` follows from what it does.
    ``memory_of_rank_0``: the first pipeline stage was measured, not the fullest.
    """

    id: str
    series: str
    model: str
    spec: ArchSpec
    layout: Layout
    cluster: Cluster
    backend: Backend
    backend_named: bool
    complete: bool
    seconds: float | None
    memory_bytes: float | None
    memory_kind: MemoryKind
    memory_of_rank_0: bool

    @property
    def out_of_memory(self) -> bool:
        return self.memory_kind == "oom"


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be used. ``complete``: the table called it complete."""

    id: str
    reason: str
    complete: bool


def read_rows(path: Path) -> tuple[list[Row], list[Skipped]]:
    """All usable rows, and the others with the reason. ``UserError`` for another kind of file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
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
    skipped: list[Skipped] = []
    for number, raw in enumerate(cells, start=2):
        cell = {key: (value or "").strip() for key, value in raw.items() if isinstance(key, str)}
        name = cell.get("id") or f"line {number}"
        try:
            rows.append(_row(name, cell))
        except (RowError, ArchError, UserError) as error:
            skipped.append(Skipped(name, str(error), _complete(cell)))
    return rows, skipped


def _row(name: str, cell: Mapping[str, str]) -> Row:
    text = " ".join(cell.get(key, "") for key in ("series", "source", "notes"))
    complete = _complete(cell)
    sharding = cell.get("zero_stage", "")
    flash = switch(cell, "flash", yes=r"(fa|flash|sdpa|cudnn|te).*|[2-9]") is not False
    stage = zero_stage(sharding) if sharding else None
    backend, named = detect_backend(text, sharding, flash=flash, zero_stage=stage or 0)
    spec = _spec(cell)
    per_node = whole(cell, "gpus_per_node", 8)
    layout = _layout(cell, flash=flash, strict=complete)
    group = shard_group(sharding, text, layout.dp * layout.cp, per_node)
    memory, kind = _memory(cell)
    seconds = _seconds(cell, layout)
    if complete and kind == "none" and seconds is None:
        raise RowError("neither a time nor a memory was measured")
    return Row(
        id=name,
        series=cell["series"],
        model=cell.get("model_name", ""),
        spec=spec,
        layout=replace(
            layout,
            zero_stage=backend.default_zero_stage if stage is None else stage,
            shard_group=group,
        ),
        cluster=_cluster(cell, text, layout, per_node),
        backend=backend,
        backend_named=named,
        complete=complete,
        seconds=seconds,
        memory_bytes=memory,
        memory_kind=kind,
        memory_of_rank_0="rank 0" in cell.get("mem_kind", "").lower(),
    )


def _complete(cell: Mapping[str, str]) -> bool:
    try:
        return (positive(cell, "complete") or 0.0) >= FULLY_KNOWN
    except RowError:
        return False


def _spec(cell: Mapping[str, str]) -> ArchSpec:
    """Dense decoder from the table's dimensions.

    GELU means GPT: biases, LayerNorm, learned positions. An MLP that is not named is GELU at four
    times the hidden size and gated at any other width.
    """
    hidden, heads = whole(cell, "hidden"), whole(cell, "heads")
    width = whole(cell, "ffn_hidden")
    mlp = cell.get("mlp", "").lower() or ("gelu" if width == 4 * hidden else "swiglu")
    gated, gpt = mlp in GATED_MLPS, mlp == "gelu"
    if not gated and mlp not in PLAIN_MLPS:
        raise RowError(f"mlp={mlp!r} is not modelled")
    if whole(cell, "ep", 1) > 1:
        raise RowError("a mixture of experts: the columns describe dense models")
    spec = ArchSpec(
        family="gpt2" if gpt else "llama",
        layers=whole(cell, "layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=whole(cell, "kv_heads", heads),
        head_dim=2 * round(hidden / heads / 2),
        ffn_hidden=width,
        vocab=whole(cell, "vocab"),
        max_seq_len=whole(cell, "seq_len"),
        mlp="swiglu" if gated else "gelu",
        norm="layernorm" if gpt else "rmsnorm",
        position="learned" if gpt else "rope",
        qkv_bias=gpt,
        attention_out_bias=gpt,
        mlp_bias=gpt,
        tied_embeddings=bool(switch(cell, "tied_emb")),
    )
    stated, counted = positive(cell, "n_params"), count_params(spec)
    if stated and not 1 / SAME_PARAMETERS < stated / counted < SAME_PARAMETERS:
        raise RowError(f"{stated:.4g} parameters are stated, its dimensions have {counted:.4g}")
    return spec


def _layout(cell: Mapping[str, str], *, flash: bool, strict: bool) -> Layout:
    tp, pp = whole(cell, "tp", 1), whole(cell, "pp", 1)
    cp, ep = whole(cell, "cp", 1), whole(cell, "ep", 1)
    devices = whole(cell, "n_gpus")
    if pp > (layers := whole(cell, "layers")):
        raise RowError(f"pp={pp} leaves stages of {layers} layers empty")
    if tp * pp * cp > devices:
        raise RowError(f"tp={tp} x pp={pp} x cp={cp} needs more than the {devices} GPUs stated")
    dp, micro = devices // (tp * pp * cp), whole(cell, "micro_batch")
    if dp * micro > whole(cell, "global_batch"):
        raise RowError(f"dp={dp} x micro-batch {micro} is more than the global batch")
    # Where the table disagrees with itself, the number of devices is what was counted.
    policy, share = recompute(cell.get("recompute", ""), strict=strict)
    # Where it is not stated, assume it with flash attention (stacks of 2023 on switch it on).
    stated = switch(cell, "sp")
    return Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        virtual_stages=whole(cell, "interleave", 1),
        cp=cp,
        ep=ep,
        micro_batch=micro,
        global_batch=whole(cell, "global_batch"),
        seq_len=whole(cell, "seq_len"),
        recompute=policy,
        recompute_share=share,
        sequence_parallel=tp > 1 and (flash if stated is None else stated),
        dtype=dtype(cell.get("dtype", "")),
        flash=flash,
    )


def _cluster(cell: Mapping[str, str], text: str, layout: Layout, per_node: int) -> Cluster:
    device = gpu(cell["gpu"], lenient=True)
    across = node_bandwidth(text)
    return Cluster(device, layout.world_size, per_node, across / per_node if across else None)


def _seconds(cell: Mapping[str, str], layout: Layout) -> float | None:
    for key in ("iter_time_best_s", "iter_time_s", "iter_time_derived_s"):
        if (seconds := positive(cell, key)) is not None:
            return seconds
    rate = positive(cell, "tokens_per_s_per_gpu")
    if rate is None:
        return None
    return layout.global_batch * layout.seq_len / (rate * layout.world_size)


def _memory(cell: Mapping[str, str]) -> tuple[float | None, MemoryKind]:
    """Peak in bytes and what it counts: torch's tensors, its cache, or all of the device."""
    kind = cell.get("mem_kind", "")
    if OUT_OF_MEMORY.search(f"{kind} {cell.get('peak_mem_gib', '')}"):
        return None, "oom"
    value = positive(cell, "peak_mem_gib")
    if value is None:
        return None, "none"
    words = kind.lower()
    if "reserved" in words:
        return value * GIB, "reserved"
    allocated = "alloc" in words or "torch" in words
    return value * GIB, "allocated" if allocated else "device"
