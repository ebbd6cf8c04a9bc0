"""What engines share of a step: its tensors, sums over the job's ranks, its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from fastllm_core import trim_heap
from fastllm_train.context_parallel import part_of_sequence
from fastllm_train.data import MicroBatch
from fastllm_train.mesh import Mesh

# Pages that are given back are cleared when they are used again: some 5 % of a small model's step.
TRIM_EVERY = 10


def batch_tensors(batch: MicroBatch, mesh: Mesh, device: torch.device) -> list[torch.Tensor]:
    """Tokens, positions, labels and mask of this rank's part of the sequences."""
    arrays = (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask)
    return [
        torch.from_numpy(np.ascontiguousarray(part_of_sequence(a, mesh))).to(
            device, non_blocking=True
        )
        for a in arrays
    ]


def global_sum(values: Sequence[float], mesh: Mesh, device: torch.device) -> list[float]:
    """Sums over tokens: the last stage's ranks have them, tensor-parallel ones in copies."""
    counts = mesh.last_stage and mesh.tp_rank == 0
    packed = torch.tensor(values, dtype=torch.float64, device=device) * counts
    dist.all_reduce(packed)
    return packed.tolist()


def global_weight(
    micro_batches: Sequence[Sequence[torch.Tensor]], mesh: Mesh, device: torch.device
) -> float:
    """Σ of the loss mask over the global batch."""
    return global_sum([sum(float(t[3].sum()) for t in micro_batches)], mesh, device)[0]


def any_rank(asked: bool, device: torch.device) -> bool:
    """Whether some rank of the job asks."""
    flag = torch.tensor(float(asked), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class HeapTrim:
    """Gives back to the system what the C library keeps of a CPU's steps: after the first, and then
    every TRIM_EVERY. What a step frees lies between blocks that stay, and the next one's tensors
    often do not fit there: at the fullest moment this memory is held beside them."""

    def __init__(self, device: torch.device) -> None:
        self._on, self._steps = device.type == "cpu", 0

    def after_step(self) -> None:
        if self._on and self._steps % TRIM_EVERY == 0:
            trim_heap()
        self._steps += 1


class StepClock:
    """Seconds per phase; on CUDA a phase's end is its kernels' end only at the step's end.
    ``progress`` hears of every phase that is done."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
        self._progress(phase)
