"""The runs of every op in which the mutation scores look for planted bugs.

Shapes reach every path: rows over several blocks, a row longer than a block's registers, odd
columns, unaligned memory.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import torch


def load(name: str, library: Path) -> Any:
    """The extension module of that name."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Device:
    """Arrays of the emulated device; the second in a row is not aligned to 16 bytes if asked."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self._arrays: list[tuple[Any, int]] = []

    def put(self, tensor: torch.Tensor, offset: int = 0) -> Any:
        array = self.empty(*tensor.shape, dtype=tensor.dtype, offset=offset)
        array.upload(tensor.contiguous().view(torch.uint8).numpy())
        return array

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Any:
        array = self.core.DeviceArray(list(shape), str(dtype).removeprefix("torch."), offset)
        self._arrays.append((array, torch.Size(shape).numel() * dtype.itemsize))
        return array

    def digest(self) -> str:
        """Of every array's bytes."""
        sha = hashlib.sha256()
        for array, size in self._arrays:
            data = bytearray(size)
            array.download(data)
            sha.update(data)
        return sha.hexdigest()

    def random(self, *shape: int, offset: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        return self.put(torch.randn(*shape).to(dtype), offset)


SHAPES = ((9, 33), (11, 600), (40, 24), (3, 9000))


def run_rmsnorm(d: Device) -> None:
    for rows, cols in SHAPES:
        x, w, y, rstd = d.random(rows, cols), d.random(cols), d.empty(rows, cols), d.empty(rows)
        d.core.rmsnorm_fwd(x, None, w, y, None, rstd, 1e-6)
        parts = d.core.rmsnorm_bwd_parts(rows, cols, True)
        dx, dw, partial = d.empty(rows, cols), d.empty(cols), d.empty(parts, cols)
        given = d.put(torch.ones(rows))
        d.core.rmsnorm_bwd(d.random(rows, cols), x, w, given, None, dx, dw, partial)


def run_layernorm(d: Device) -> None:
    for rows, cols in SHAPES:
        x, w, b = d.random(rows, cols), d.random(cols), d.random(cols)
        y, mean, rstd = d.empty(rows, cols), d.empty(rows), d.empty(rows)
        d.core.layernorm_fwd(x, None, w, b, y, None, mean, rstd, 1e-5)
        parts = d.core.layernorm_bwd_parts(rows, cols, True)
        dx, dw, db = d.empty(rows, cols), d.empty(cols), d.empty(cols)
        partial = d.empty(2, parts, cols)
        given = d.put(torch.ones(rows))
        d.core.layernorm_bwd(d.random(rows, cols), x, w, given, given, None, dx, dw, db, partial)


def run_glu(d: Device) -> None:
    for count, offset in ((1000, 0), (1001, 0), (64, 1)):
        gate, up = d.random(count, offset=offset), d.random(count)
        d.core.glu_fwd(gate, up, d.empty(count), "silu")
        d.core.glu_bwd(d.random(count), gate, up, d.empty(count), d.empty(count), "gelu")


def run_bias_gelu(d: Device) -> None:
    for rows, cols in ((70, 24), (5, 33), (3, 1100)):
        x, b = d.random(rows, cols), d.random(cols)
        d.core.bias_gelu_fwd(x, b, d.empty(rows, cols))
        partial = d.empty(d.core.bias_gelu_bwd_parts(rows, cols, True), cols)
        dx, db = d.empty(rows, cols), d.empty(cols)
        d.core.bias_gelu_bwd(d.random(rows, cols), x, b, dx, db, partial)


def run_cross_entropy(d: Device) -> None:
    for rows, cols in ((9, 33), (3, 5000)):
        x = d.random(rows, cols)
        labels = torch.arange(rows) % cols
        labels[0] = cols + 100_000
        on_device = d.put(labels)
        d.core.cross_entropy_fwd(x, on_device, d.empty(rows), d.empty(rows), d.empty(rows))
        d.core.cross_entropy_loss(x, on_device, d.empty(rows), d.empty(rows))
        lse, dloss = d.random(rows), d.random(rows)
        d.core.cross_entropy_bwd(x, on_device, lse, dloss, d.empty(rows, cols))


def run_softmax(d: Device) -> None:
    for shape in ((2, 3, 5, 33), (1, 1, 3, 9000)):
        for causal in (False, True):
            x, y, dx = d.random(*shape), d.empty(*shape), d.empty(*shape)
            d.core.softmax_fwd(x, None, None, y, 1.0, causal)
            d.core.softmax_bwd(x, d.random(*shape), dx, 1.0, causal)


def run_grad_norm(d: Device) -> None:
    for count in (1001, 20003):
        d.core.squared_sum(d.random(count), d.empty(d.core.squared_sum_parts(count, True)))


def run_adamw(d: Device) -> None:
    for count in (1000, 1001):
        state = [d.random(count), d.random(count), d.put(torch.zeros(count))]
        state.append(d.put(torch.ones(count)))
        d.core.adamw(*state, None, None, 1e-3, 0.9, 0.99, 1e-8, 0.1, 1)
        upper = d.random(count, dtype=torch.bfloat16)
        state[0] = d.put(torch.zeros(count, dtype=torch.int16))
        d.core.adamw(*state, upper, None, 1e-3, 0.9, 0.99, 1e-8, 0.1, 1)


def run_moe_permute(d: Device) -> None:
    for cols in (33, 2000):
        slots = torch.arange(20).view(10, 2)
        slots[3, 1] = -1
        on_device, x, y = d.put(slots), d.random(10, cols), d.random(20, cols)
        d.core.moe_permute(on_device, x, d.empty(20, cols))
        d.core.moe_combine(on_device, None, y, d.empty(10, cols))
        w, dy, dw = d.random(10, 2), d.empty(20, cols), d.empty(10, 2)
        d.core.moe_combine_bwd(on_device, w, x, y, dy, dw)


RUNS = {name.removeprefix("run_"): f for name, f in list(globals().items()) if name[:4] == "run_"}


# Sizes that fill no tile; depths above the pipeline's, and of one stage, where the pipeline's other
# copies, of zeros, are still under way when the epilogue begins.
def gemm_linear_bias(d: Device) -> None:
    for m, n, k, biased in ((130, 136, 264, True), (70, 72, 24, False)):
        x, w, b = (d.random(*shape, dtype=torch.bfloat16) for shape in ((m, k), (n, k), (n,)))
        d.core.linear_bias(x, w, b if biased else None, d.empty(m, n, dtype=torch.bfloat16))


def gemm_linear_weight_grad(d: Device) -> None:
    for m, n, k in ((130, 136, 264), (24, 72, 72)):
        dy, x = (d.random(m, size, dtype=torch.bfloat16) for size in (n, k))
        d.core.linear_weight_grad(dy, x, d.random(n, k))


def gemm_linear_bias_gelu(d: Device) -> None:
    for m, n, k in ((130, 136, 264), (70, 72, 24)):
        x, w, b = (d.random(*shape, dtype=torch.bfloat16) for shape in ((m, k), (n, k), (n,)))
        y, pre = (d.empty(m, n, dtype=torch.bfloat16) for _ in range(2))
        d.core.linear_bias_gelu(x, w, b, y, pre)


def gemm_linear_swiglu(d: Device) -> None:
    for m, n, k in ((130, 136, 264), (70, 72, 24)):
        x, wg, wu = (d.random(*shape, dtype=torch.bfloat16) for shape in ((m, k), (n, k), (n, k)))
        gate, up, y = (d.empty(m, n, dtype=torch.bfloat16) for _ in range(3))
        d.core.linear_swiglu(x, wg, wu, gate, up, y)


def gemm_grouped_linear(d: Device) -> None:
    """Groups of many tokens, of one and of none; a block has several tiles."""
    for sizes, n, k in (((70, 0, 1, 130), 136, 264), ((3, 140), 72, 24)):
        m, groups = sum(sizes), len(sizes)
        x, w = (d.random(*shape, dtype=torch.bfloat16) for shape in ((m, k), (groups, n, k)))
        offsets = d.put(torch.tensor([0, *sizes]).cumsum(0))
        words = d.core.grouped_workspace_bytes(groups) // 8 + 1
        y = d.empty(m, n, dtype=torch.bfloat16)
        d.core.grouped_linear(x, w, offsets, y, d.empty(words, dtype=torch.int64))


# Of the kernels for sm_90a: more tiles than blocks, so that a block goes on to a second one. Depths
# above that of the pipeline, which then uses its buffers again, and below it: else the pipeline
# orders what the epilogues of two tiles do. And a block whose first tile has columns beyond the
# matrix, of which no earlier tile left anything in shared memory.
def gemm_linear_bias_sm90(d: Device) -> None:
    for m, n, k, biased in ((130, 264, 520, True), (130, 264, 96, False), (67, 136, 96, False)):
        x, w, b = (d.random(*shape, dtype=torch.bfloat16) for shape in ((m, k), (n, k), (n,)))
        d.core.linear_bias(x, w, b if biased else None, d.empty(m, n, dtype=torch.bfloat16))


def gemm_linear_bias_gelu_sm90(d: Device) -> None:
    """An epilogue that stores two matrices."""
    for m, n, k in ((130, 264, 520), (130, 264, 96), (67, 136, 96)):
        x, w, b = (d.random(*shape, dtype=torch.bfloat16) for shape in ((m, k), (n, k), (n,)))
        y, pre = (d.empty(m, n, dtype=torch.bfloat16) for _ in range(2))
        d.core.linear_bias_gelu(x, w, b, y, pre)


def gemm_linear_swiglu_sm90(d: Device) -> None:
    """An epilogue that loads one matrix and stores two."""
    for m, n, k in ((130, 264, 392), (130, 264, 96), (67, 136, 96)):
        x, wg, wu = (d.random(*shape, dtype=torch.bfloat16) for shape in ((m, k), (n, k), (n, k)))
        d.core.linear_swiglu(x, wg, wu, *(d.empty(m, n, dtype=torch.bfloat16) for _ in range(3)))


def gemm_linear_weight_grad_sm90(d: Device) -> None:
    """Operands across the depth, and a matrix in place."""
    for m, n, k in ((392, 264, 136), (72, 264, 136), (67, 136, 96)):
        dy, x = (d.random(m, size, dtype=torch.bfloat16) for size in (n, k))
        d.core.linear_weight_grad(dy, x, d.random(n, k))


def gemm_grouped_linear_sm90(d: Device) -> None:
    """More groups than blocks; more empty ones in a row than a warp has lanes to look at."""
    empty = (0,) * 33
    few, many = (70, 0, 1, 130, 3), (*empty, *(i % 3 + 1 for i in range(12)), *empty, 70)
    for sizes, k in ((few, 456), (few, 72), (many, 72)):
        m, n, groups = sum(sizes), 136, len(sizes)
        x, w = (d.random(*shape, dtype=torch.bfloat16) for shape in ((m, k), (groups, n, k)))
        offsets = d.put(torch.tensor([0, *sizes]).cumsum(0))
        words = d.core.grouped_workspace_bytes(groups) // 8 + 1
        y = d.empty(m, n, dtype=torch.bfloat16)
        d.core.grouped_linear(x, w, offsets, y, d.empty(words, dtype=torch.int64))


GEMM_RUNS = {
    name.removeprefix("gemm_"): f for name, f in list(globals().items()) if name[:5] == "gemm_"
}

# The emulated device, where it is not the default.
HOPPER = {"capability": 90, "multiprocessors": 2}
DEVICE_OPTIONS = {name: HOPPER for name in GEMM_RUNS if name.endswith("_sm90")}
# Kernels of a run that are another op's, whose run has their mutants.
OTHERS_KERNELS = {"linear_swiglu_sm90": "LinCombPerColBias"}
