"""The CPU's priors follow from what the kernel says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm_planner.hardware.cpu import PRIOR_CLOCK_GHZ, PRIOR_MEMORY_BYTES, read_cpu

INTEL = "cpu MHz\t\t: 2000.0\nflags\t\t: fpu sse2 avx avx2 fma\ncpu MHz\t\t: 3000.0\n"
ARM = "BogoMIPS\t: 50.0\nFeatures\t: fp asimd bf16\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("cpuinfo", "clock", "per_cycle", "bf16"),
    [
        (INTEL, 3.0, 32.0, 1.0),
        (INTEL.replace("avx2", "avx512f avx512_bf16"), 3.0, 32.0, 2.0),
        (INTEL.replace("avx avx2 fma", ""), 3.0, 8.0, 1.0),
        (ARM, PRIOR_CLOCK_GHZ, 16.0, 2.0),
        ("", PRIOR_CLOCK_GHZ, 8.0, 1.0),
    ],
)
def test_rates(tmp_path: Path, cpuinfo: str, clock: float, per_cycle: float, bf16: float) -> None:
    facts = read_cpu(write(tmp_path / "cpuinfo", cpuinfo), write(tmp_path / "meminfo", ""))
    assert facts.fp32_tflops == pytest.approx(facts.cores * clock * per_cycle / 1e3)
    assert facts.bf16_tflops == pytest.approx(bf16 * facts.fp32_tflops)
    assert facts.memory_bytes == PRIOR_MEMORY_BYTES


def test_memory_is_the_kernels(tmp_path: Path) -> None:
    meminfo = write(tmp_path / "meminfo", "MemTotal:       1024 kB\nMemFree: 1 kB\n")
    assert read_cpu(tmp_path / "absent", meminfo).memory_bytes == 2**20
