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
from fastllm_planner.hardware.cpu import PRIOR_MEMORY_GBPS, read_cpu

GIB = 2**30

# A GEMM that nobody measured reaches this share of the datasheet peak: the median of the measured
# ones (A100 0.87, H100 0.80, B200 0.78, MI300X 0.51) rounded down.
UNMEASURED_MATMUL_SHARE = 0.78


@dataclass(frozen=True)
class Gpu:
    """One device. TFLOP/s dense, bytes, bytes/s one direction per device.

    ``peak_tflops``: datasheet peak by dtype; ``matmul_tflops``: measured ceiling of a large GEMM
    by dtype (a share of the peak where nobody measured one, see ``matmul_measured``).
    ``peer_bandwidth``: the link to one peer (xGMI); ``intra_node_bandwidth`` behind a switch.
    ``scale_up``: devices in one such fabric where that is more than a node (NVL72), else 0.
    """

    name: str
    peak_tflops: tuple[tuple[str, float], ...]
    matmul_tflops: tuple[tuple[str, float], ...]
    matmul_measured: bool
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


def _build(name: str, raw: dict[str, Any]) -> Gpu:
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
        matmul_measured=bool(measured),
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


@cache
def _tables() -> tuple[dict[str, Gpu], dict[str, str]]:
    """Canonical name → device, and lower-cased name or alias → canonical name."""
    text = files(__name__).joinpath("gpus.toml").read_text(encoding="utf-8")
    raw: dict[str, dict[str, Any]] = tomllib.loads(text)
    merged: dict[str, dict[str, Any]] = {}
    for name, table in raw.items():
        base = merged[table["base"]] if "base" in table else {}
        merged[name] = {**base, **table}
    aliases = {name.lower(): name for name in raw}
    for name, table in raw.items():
        aliases.update({alias.lower(): name for alias in table.get("aliases", [])})
    return {name: _build(name, table) for name, table in merged.items()}, aliases


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


def gpu(name: str) -> Gpu:
    """A device by name or alias (case-insensitive); ``cpu`` is this machine's, with prior rates."""
    if name.lower().startswith("cpu"):
        return cpu_device()
    devices, aliases = _tables()
    key = aliases.get(name.lower())
    if key is None:
        near = difflib.get_close_matches(name.lower(), sorted(aliases), n=1, cutoff=0.5)
        hint = f"did you mean {aliases[near[0]]!r}?" if near else f"known: {', '.join(gpu_names())}"
        raise UserError(f"unknown GPU {name!r}", hint=hint)
    return devices[key]


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
        matmul_measured=False,
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
