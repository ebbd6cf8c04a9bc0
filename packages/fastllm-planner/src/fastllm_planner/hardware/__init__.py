"""What a plan runs on: accelerators (``gpus.toml``), this machine's CPU, and clusters of them."""

from __future__ import annotations

import difflib
import math
import tomllib
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

from fastllm_planner.errors import UserError
from fastllm_planner.hardware.board_names import BoardName, read_board_name, squeeze
from fastllm_planner.hardware.cpu import PRIOR_MEMORY_GBPS, read_cpu

GIB = 2**30

# A GEMM that nobody measured reaches this share of the datasheet peak: the median of the measured
# ones (A100 0.87, H100 0.80, B200 0.78, MI300X 0.51) rounded down.
UNMEASURED_MATMUL_SHARE = 0.78
# "B200-192G", "GB200 189 GB": one board's memory is told in several ways.
SAME_MEMORY = 0.08


@dataclass(frozen=True)
class Gpu:
    """One device. TFLOP/s dense, bytes, bytes/s one direction per device.

    ``peak_tflops``: datasheet peak by dtype; ``matmul_tflops``: measured ceiling of a large GEMM
    by dtype; ``matmul_source`` says who measured it: "measured" on this board, "as measured on"
    another, or a share of the peak.
    ``peer_bandwidth``: the link to one peer (xGMI); ``intra_node_bandwidth`` behind a switch.
    ``scale_up``: devices in one such fabric where that is more than a node (NVL72), else 0.
    """

    name: str
    peak_tflops: tuple[tuple[str, float], ...]
    matmul_tflops: tuple[tuple[str, float], ...]
    matmul_source: str
    sustained: float
    memory_bytes: int
    memory_bandwidth: float
    intra_node_bandwidth: float
    peer_bandwidth: float
    inter_node_bandwidth: float
    host_bandwidth: float
    sms: int
    architecture: str
    scale_up: int
    source: str

    def __hash__(self) -> int:
        """Equal devices have equal names; search hashes them very often."""
        return hash(self.name)

    def peak(self, dtype: str) -> float:
        """Dense datasheet peak in TFLOP/s; ``UserError`` if the device lacks the dtype."""
        return _by_dtype(self.name, self.peak_tflops, dtype)

    def matmul(self, dtype: str) -> float:
        """Ceiling of a large GEMM in TFLOP/s."""
        return _by_dtype(self.name, self.matmul_tflops, dtype)

    def supports(self, dtype: str) -> bool:
        return any(name == dtype for name, _ in self.peak_tflops)


@dataclass(frozen=True)
class Cluster:
    """``n_gpus`` devices in nodes of ``gpus_per_node``; bandwidth in bytes/s per device.

    ``inter_node_bandwidth`` None takes the device's usual one. ``host_memory_bytes`` is per node
    (None: unknown, offload is then not checked against it).
    """

    gpu: Gpu
    n_gpus: int
    gpus_per_node: int = 8
    inter_node_bandwidth: float | None = None
    host_memory_bytes: int | None = None
    nvme_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.n_gpus < 1 or self.gpus_per_node < 1:
            raise UserError(f"{self.n_gpus} GPUs in nodes of {self.gpus_per_node} make no cluster")

    @property
    def nodes(self) -> int:
        return math.ceil(self.n_gpus / self.gpus_per_node)

    @cached_property
    def device(self) -> Gpu:
        """What one rank has: the GPU, or its share of the CPU (ranks of a node divide it)."""
        if self.gpu.architecture != "cpu":
            return self.gpu
        ranks = min(self.n_gpus, self.gpus_per_node)
        return _share(self.gpu, ranks)

    @cached_property
    def fabric_size(self) -> int:
        """Devices that reach each other without the network: a node, or a rack of NVL72."""
        return max(self.gpus_per_node, self.gpu.scale_up)

    @cached_property
    def network_bandwidth(self) -> float:
        """Bytes/s per device across nodes."""
        return self.inter_node_bandwidth or self.gpu.inter_node_bandwidth


def _share(machine: Gpu, ranks: int) -> Gpu:
    """One of ``ranks`` equal parts of a machine."""
    return replace(
        machine,
        peak_tflops=tuple((dtype, rate / ranks) for dtype, rate in machine.peak_tflops),
        matmul_tflops=tuple((dtype, rate / ranks) for dtype, rate in machine.matmul_tflops),
        memory_bytes=machine.memory_bytes // ranks,
        memory_bandwidth=machine.memory_bandwidth / ranks,
        sms=max(1, machine.sms // ranks),
    )


def _by_dtype(name: str, table: tuple[tuple[str, float], ...], dtype: str) -> float:
    for key, value in table:
        if key == dtype:
            return value
    known = ", ".join(key for key, _ in table)
    raise UserError(f"{name} has no {dtype} units", hint=f"it has {known}")


def _matmul_source(name: str, raw: dict[str, dict[str, Any]]) -> str:
    """Where the ceiling of a large GEMM comes from: this board, the one it is based on, or none."""
    origin = name
    while "matmul_tflops" not in raw[origin] and "base" in raw[origin]:
        origin = raw[origin]["base"]
    if not raw[origin].get("matmul_tflops"):
        return "not measured, a share of the peak"
    stated = str(raw[origin].get("matmul_source", "measured"))
    if origin == name or stated != "measured":
        return stated
    return f"as measured on {origin}"


def _build(name: str, raw: dict[str, Any], matmul_source: str) -> Gpu:
    peaks = [(d, float(raw[f"tflops_{d}"])) for d in _DTYPES if raw.get(f"tflops_{d}")]
    half = "bf16" if "tflops_bf16" in raw else "fp16"
    measured = float(raw.get("matmul_tflops", 0.0))
    unmeasured = float(raw.get("matmul_share", UNMEASURED_MATMUL_SHARE))
    share = measured / raw[f"tflops_{half}"] if measured else unmeasured
    ceilings: list[tuple[str, float]] = []
    for dtype, peak in peaks:
        fp8 = float(raw.get("matmul_fp8_tflops", 0.0)) if dtype == "fp8" else 0.0
        ceilings.append((dtype, fp8 or peak * share))
    intra = float(raw["intra_node_gbps"]) * 1e9
    return Gpu(
        name=name,
        peak_tflops=tuple(peaks),
        matmul_tflops=tuple(ceilings),
        matmul_source=matmul_source,
        sustained=float(raw.get("sustained", 1.0)),
        memory_bytes=int(raw["memory_gib"] * GIB),
        memory_bandwidth=float(raw["memory_gbps"]) * 1e9,
        intra_node_bandwidth=intra,
        peer_bandwidth=float(raw.get("peer_gbps", raw["intra_node_gbps"])) * 1e9,
        inter_node_bandwidth=float(raw["inter_node_gbps"]) * 1e9,
        host_bandwidth=float(raw["host_gbps"]) * 1e9,
        sms=int(raw["sms"]),
        architecture=str(raw["architecture"]),
        scale_up=int(raw.get("scale_up", 0)),
        source=str(raw["source"]),
    )


_DTYPES = ("fp32", "fp16", "bf16", "fp8")


@dataclass(frozen=True)
class _Board:
    """How an entry of the table is told from others of the same board."""

    name: str
    board: str
    form: str
    memory_gb: int
    usual: bool


@cache
def _tables() -> tuple[dict[str, Gpu], dict[str, str], tuple[_Board, ...]]:
    """Name → device; squeezed name or other spelling → name; and what tells boards apart."""
    text = files(__name__).joinpath("gpus.toml").read_text(encoding="utf-8")
    raw: dict[str, dict[str, Any]] = tomllib.loads(text)
    merged: dict[str, dict[str, Any]] = {}
    spellings: dict[str, str] = {}
    boards: list[_Board] = []
    for name, table in raw.items():
        base = merged[table["base"]] if "base" in table else {}
        merged[name] = {**base, **table}
        for spelling in (name, *table.get("also", [])):
            spellings[squeeze(spelling)] = name
        key = squeeze(table["board"])
        usual = bool(table.get("usual", False))
        boards.append(_Board(name, key, table["form"], table["memory_gb"], usual))
    devices = {
        name: _build(name, table, _matmul_source(name, raw)) for name, table in merged.items()
    }
    return devices, spellings, tuple(boards)


@dataclass(frozen=True)
class AttentionRate:
    """Causal flash attention, TFLOP/s of the work done (``attention.toml``)."""

    matmul: float
    fwd: float
    bwd: float
    half_seq: float


@cache
def _attention_rates() -> dict[str, dict[str, AttentionRate]]:
    text = files(__name__).joinpath("attention.toml").read_text(encoding="utf-8")
    raw: dict[str, dict[str, dict[str, float]]] = tomllib.loads(text)
    return {
        architecture: {kind: AttentionRate(**values) for kind, values in kinds.items()}
        for architecture, kinds in raw.items()
    }


def attention_rate(device: Gpu, generation: str) -> AttentionRate:
    """Rates of the newest kernel of the architecture that is not newer than ``generation``."""
    kinds = _attention_rates()[device.architecture]
    known = sorted(kinds)
    older = [kind for kind in known if kind <= generation]
    return kinds[older[-1] if older else known[0]]


def gpu_names() -> list[str]:
    """Canonical names, in file order, and ``cpu``."""
    return [*_tables()[0], "cpu"]


def gpu(name: str, *, lenient: bool = False) -> Gpu:
    """A device by any spelling of its name; ``cpu`` is this machine's, with prior rates.

    A board with another memory than the table's ("A100-64G") is the nearest one with that memory.
    ``lenient``: pass over words that mean nothing, as names in papers and logs have.
    Raises ``UserError``, naming the nearest known name.
    """
    if name.lower().startswith("cpu"):
        return cpu_device()
    devices, spellings, boards = _tables()
    if exact := spellings.get(squeeze(name)):
        return devices[exact]
    read = read_board_name(name, {entry.board for entry in boards})
    if read is not None and (lenient or not read.unknown):
        found = _pick([entry for entry in boards if entry.board == read.board], read)
        if found is not None:
            device = devices[found.name]
            if not read.memory_gb or abs(read.memory_gb / found.memory_gb - 1) <= SAME_MEMORY:
                return device
            return with_memory(device, device.memory_bytes * read.memory_gb // found.memory_gb)
    known = {entry.lower(): entry for entry in gpu_names()}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if not near and read is not None:
        near = [entry.name.lower() for entry in boards if entry.board == read.board][:1]
    hint = f"did you mean {known[near[0]]!r}?" if near else f"known: {', '.join(known.values())}"
    raise UserError(f"unknown GPU {name!r}", hint=hint)


def _pick(boards: list[_Board], read: BoardName) -> _Board | None:
    """The entry of a board that a name means: its form, then the nearest memory; None for a form
    that the board does not come in or a memory far from all of its own."""
    if read.form:
        boards = [entry for entry in boards if entry.form == read.form]
    if not boards:
        return None
    usual = max(boards, key=lambda entry: (entry.usual, entry.memory_gb))
    if not read.memory_gb:
        return usual
    nearest = min(boards, key=lambda b: (abs(b.memory_gb - read.memory_gb), b.form != usual.form))
    return nearest if 0.5 <= read.memory_gb / nearest.memory_gb <= 2 else None


@cache
def cpu_device() -> Gpu:
    """This machine as one device. Rates are priors, not measurements; memory is the kernel's."""
    facts = read_cpu()
    bandwidth = PRIOR_MEMORY_GBPS * 1e9
    fp32, bf16 = facts.fp32_tflops, facts.bf16_tflops
    rates = (("fp32", fp32), ("bf16", bf16), ("fp16", fp32))
    return Gpu(
        name=f"cpu-prior-{facts.cores}-cores",
        peak_tflops=rates,
        matmul_tflops=rates,
        matmul_source="a prior, not measured",
        sustained=1.0,
        memory_bytes=facts.memory_bytes,
        memory_bandwidth=bandwidth,
        intra_node_bandwidth=bandwidth / 4,
        peer_bandwidth=bandwidth / 4,
        inter_node_bandwidth=1.25e9,
        host_bandwidth=bandwidth,
        sms=facts.cores,
        architecture="cpu",
        scale_up=0,
        source="prior: cores x clock x FLOPs per cycle; calibrate replaces it",
    )


def with_memory(device: Gpu, memory_bytes: int) -> Gpu:
    """The same device with another capacity (``--gpu-memory``)."""
    return replace(device, memory_bytes=memory_bytes)
