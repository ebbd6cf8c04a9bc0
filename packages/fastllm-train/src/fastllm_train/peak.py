"""The peak that MFU is measured against: a measured GEMM, or a GPU's data sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastllm_planner.errors import UserError as UnknownDevice
from fastllm_planner.hardware import gpu

if TYPE_CHECKING:
    import torch

GEMM_SIZES = (1024, 2048)
SECONDS_PER_SIZE = 0.6

# Part of torch.cuda.get_device_name() → name in the planner's table; the first match counts.
_GPU_NAMES = (
    ("H100 80GB HBM3", "H100-SXM"),
    ("H100 PCIe", "H100-PCIe"),
    ("H100 NVL", "H100-NVL"),
    ("H200", "H200-SXM"),
    ("H20", "H20"),
    ("H800", "H800-SXM"),
    ("GB200", "GB200"),
    ("GB300", "GB300"),
    ("B200", "B200-SXM"),
    ("B300", "B300-SXM"),
    ("A100-SXM4-80GB", "A100-80G"),
    ("A100-SXM4-40GB", "A100-40G"),
    ("A100 80GB PCIe", "A100-PCIe-80G"),
    ("A100-PCIE-40GB", "A100-PCIe-40G"),
    ("A800", "A800-80G"),
    ("V100-SXM2-16GB", "V100-16G"),
    ("V100-SXM2-32GB", "V100-32G"),
    ("L40S", "L40S"),
    ("RTX 4090", "RTX-4090"),
    ("RTX 5090", "RTX-5090"),
)


@dataclass(frozen=True)
class Peak:
    """TFLOP/s of one device (one process on CPU)."""

    tflops: float
    source: Literal["measured GEMM", "datasheet"]


def datasheet_tflops(device_name: str, dtype: str) -> float | None:
    """Dense peak of a GPU by torch's name for it; None when the table does not know it."""
    for part, name in _GPU_NAMES:
        if part in device_name:
            try:
                return gpu(name).peak(dtype)
            except UnknownDevice:
                return None
    return None


def gemm_tflops(
    dtype: torch.dtype,
    device: torch.device,
    *,
    sizes: tuple[int, ...] = GEMM_SIZES,
    seconds: float = SECONDS_PER_SIZE,
) -> float:
    """Best TFLOP/s of an n×n by n×n product over ``sizes``, with this process's threads.

    2n³ FLOPs a product, by what the models multiply with. The best of several tries: other load on
    the machine only slows it down.
    """
    import torch

    from fastllm_train.ops.matmul import multiply_

    best = 0.0
    generator = torch.Generator(device).manual_seed(0)  # not the global one: a run's RNG is its own
    for size in sizes:
        a, b = (
            torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2)
        )
        out = torch.empty(size, size, dtype=dtype, device=device)
        multiply_(out, a, b)
        end = time.perf_counter() + seconds
        while True:
            _synchronise(device)
            start = time.perf_counter()
            multiply_(out, a, b)
            _synchronise(device)
            now = time.perf_counter()
            best = max(best, 2.0 * size**3 / (now - start) / 1e12)
            if now >= end:
                break
    return best


def job_peak(dtype_name: str, dtype: torch.dtype, device: torch.device) -> Peak:
    """Peak per device of this job; collective. On CPU every process multiplies at the same time, so
    the cores are shared as they are in training, and the mean over processes is the peak of one."""
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        known = datasheet_tflops(torch.cuda.get_device_name(device), dtype_name)
        if known is not None:
            return Peak(known, "datasheet")
    # A CPU without fp16 instructions takes minutes for a large product.
    slow = device.type == "cpu" and dtype_name == "fp16"
    sizes = (128,) if slow else GEMM_SIZES
    dist.barrier()
    mine = torch.tensor(gemm_tflops(dtype, device, sizes=sizes), dtype=torch.float64, device=device)
    dist.all_reduce(mine)
    return Peak(float(mine) / dist.get_world_size(), "measured GEMM")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
