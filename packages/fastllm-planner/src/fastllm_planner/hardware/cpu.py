"""What the kernel says of this machine's CPU, and the rates to expect from it (priors)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30
# fp32 FLOPs a core and cycle: lanes × 2 (fused multiply-add) × 2 units. AVX-512 counts as one full
# unit: Zen 4 splits it in two, and server parts lower their clock under it.
_FLOPS_PER_CYCLE = (("avx512f", 32.0), ("avx2", 32.0), ("avx", 16.0), ("asimd", 16.0))
_FLOPS_PER_CYCLE_SCALAR = 8.0
# These multiply bf16 pairs into fp32: twice the fp32 rate (AMX more; 2 is what is safe to expect).
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
PRIOR_CLOCK_GHZ = 2.5
PRIOR_MEMORY_GBPS = 20.0
PRIOR_MEMORY_BYTES = 8 * GIB


@dataclass(frozen=True)
class CpuFacts:
    """Cores this process may use, clock in GHz, memory in bytes, instruction-set flags."""

    cores: int
    clock_ghz: float
    memory_bytes: int
    flags: frozenset[str]

    @property
    def fp32_tflops(self) -> float:
        """cores × clock × FLOPs per cycle: a prior for a large GEMM, not a measurement."""
        for flag, flops in _FLOPS_PER_CYCLE:
            if flag in self.flags:
                return self.cores * self.clock_ghz * flops / 1e3
        return self.cores * self.clock_ghz * _FLOPS_PER_CYCLE_SCALAR / 1e3

    @property
    def bf16_tflops(self) -> float:
        """Twice fp32 with bf16 dot products, else the same: the CPU widens to fp32."""
        factor = 2.0 if any(flag in self.flags for flag in _BF16_FLAGS) else 1.0
        return self.fp32_tflops * factor


def read_cpu(
    cpuinfo: Path = Path("/proc/cpuinfo"), meminfo: Path = Path("/proc/meminfo")
) -> CpuFacts:
    """This machine's facts; what the files do not say is a prior."""
    clock, flags = 0.0, frozenset[str]()
    for line in _lines(cpuinfo):
        key, _, value = line.partition(":")
        if key.strip() == "cpu MHz":
            clock = max(clock, float(value) / 1e3)
        elif key.strip() in ("flags", "Features"):
            flags |= frozenset(value.split())
    memory = PRIOR_MEMORY_BYTES
    for line in _lines(meminfo):
        if line.startswith("MemTotal:"):
            memory = int(line.split()[1]) * 1024
    return CpuFacts(_available_cores(), clock or PRIOR_CLOCK_GHZ, memory, flags)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _available_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
