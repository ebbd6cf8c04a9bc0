"""How a job is spread over devices ([parallel]) and how many sequences a step takes ([batch])."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fastllm_train.errors import UserError

Offload = Literal["none", "optimizer", "optimizer+params"]
Recompute = Literal["none", "selective", "full"]


# Coordinates of a rank, slowest first. Data parallelism is edp * ep: neighbouring replicas share
# out the experts.
AXES = ("pp", "edp", "ep", "cp", "tp")


class Coordinates(NamedTuple):
    """Where a rank stands on each of ``AXES``; tensor-parallel ranks are neighbours (the order of
    Megatron-LM: tensor, context, expert, data, pipeline)."""

    pp: int
    edp: int
    ep: int
    cp: int
    tp: int

    def dp(self, parallel: ParallelConfig) -> int:
        """Which replica of the model this rank belongs to."""
        return self.edp * parallel.ep + self.ep


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel dimensions; a job has ``dp*tp*pp*cp`` processes.

    ``ep`` replicas share out the experts (it divides ``dp`` and adds no processes). ``cp`` ranks
    share a sequence; attention exchanges heads for positions (Jacobs et al. 2023,
    arXiv:2309.14509).
    ``recompute``: "full" keeps only each block's input and runs the block again in the backward
    pass (Chen et al. 2016, arXiv:1604.06174); "selective" recomputes the attention core alone
    (Korthikanti et al. 2022, arXiv:2205.05198).
    ``nvme_path``: what ``offload`` moves goes to files in this folder instead of host memory.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    virtual_stages: int = 1
    zero_stage: int = 1
    offload: Offload = "none"
    nvme_path: str = ""
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "virtual_stages"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name}={getattr(self, name)} is not a positive number")
        if self.zero_stage not in (0, 1, 2, 3):
            raise UserError(f"parallel.zero_stage={self.zero_stage}", hint="use 0, 1, 2 or 3")
        if self.dp % self.ep:
            raise UserError(
                f"parallel.ep={self.ep} does not divide parallel.dp={self.dp}: experts are shared "
                "out among replicas",
                hint="set parallel.ep to a divisor of parallel.dp",
            )

    def axis_sizes(self) -> dict[str, int]:
        """By name of ``AXES``."""
        return {
            "pp": self.pp,
            "edp": self.dp // self.ep,
            "ep": self.ep,
            "cp": self.cp,
            "tp": self.tp,
        }

    def coordinates(self, rank: int) -> Coordinates:
        values: dict[str, int] = {}
        for axis, size in reversed(self.axis_sizes().items()):
            rank, values[axis] = divmod(rank, size)
        return Coordinates(**values)

    def rank_of(self, at: Coordinates) -> int:
        rank = 0
        for axis, size in self.axis_sizes().items():
            rank = rank * size + getattr(at, axis)
        return rank

    def dp_rank(self, rank: int) -> int:
        """Which replica of the model process ``rank`` belongs to."""
        return self.coordinates(rank).dp(self)

    @property
    def world_size(self) -> int:
        """Processes of the job (one device each)."""
        return self.dp * self.tp * self.pp * self.cp


@dataclass(frozen=True)
class BatchConfig:
    """Sequences per step. ``global`` in TOML; ``seq_len`` in tokens.

    ``rampup`` = [start, increment, samples] lets the batch grow from ``start`` to ``global`` by
    ``increment`` in equal parts of the first ``samples`` samples, as Megatron-LM's
    ``--rampup-batch-size`` does.
    """

    micro: int = 1
    global_size: int = field(default=1, metadata={"key": "global"})
    seq_len: int = 1024
    rampup: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, key in (("micro", "micro"), ("global_size", "global"), ("seq_len", "seq_len")):
            if getattr(self, name) < 1:
                raise UserError(f"batch.{key}={getattr(self, name)} is not a positive number")
        if self.rampup:
            self._check_rampup()

    def _check_rampup(self) -> None:
        shown = f"batch.rampup={list(self.rampup)}"
        if len(self.rampup) != 3 or min(self.rampup) < 1:
            raise UserError(
                f"{shown} is not three positive numbers",
                hint="write [start, increment, samples], for example [32, 32, 1000000]",
            )
        start, increment, _ = self.rampup
        if start >= self.global_size or (self.global_size - start) % increment:
            raise UserError(
                f"{shown}: increments of {increment} do not lead from {start} to "
                f"batch.global={self.global_size}",
                hint="use an increment that divides batch.global - start",
            )

    def size_at(self, consumed: int) -> int:
        """Sequences of the step that starts after ``consumed`` samples."""
        if not self.rampup:
            return self.global_size
        start, increment, samples = self.rampup
        increments = (self.global_size - start) // increment
        return start + increment * min(increments, consumed * increments // samples)

    def steps_to(self, samples: int) -> int:
        """Steps until at least ``samples`` samples are consumed."""
        return self._count(samples=samples)[0]

    def samples_after(self, steps: int) -> int:
        """Samples that the first ``steps`` steps consume."""
        return self._count(steps=steps)[1]

    def _count(self, *, steps: int | None = None, samples: int | None = None) -> tuple[int, int]:
        """(steps, samples) at the first moment when either bound is reached."""
        done = consumed = 0
        while (size := self.size_at(consumed)) < self.global_size:
            if done == steps or (samples is not None and consumed >= samples):
                return done, consumed
            done, consumed = done + 1, consumed + size
        if samples is not None:
            left = max(0, -(-(samples - consumed) // self.global_size))
        else:
            assert steps is not None
            left = steps - done
        return done + left, consumed + left * self.global_size

    def accumulation(self, dp: int, consumed: int | None = None) -> int:
        """Micro-batches per device and step: after ``consumed`` samples, or (None) of the whole
        batch. ``UserError`` when they do not come out even."""
        size = self.global_size if consumed is None else self.size_at(consumed)
        per_pass = self.micro * dp
        for value, name in ((size, "batch.global"), *zip(self.rampup[:2], _RAMPUP, strict=False)):
            if value % per_pass:
                below = value // per_pass * per_pass
                near = " or ".join(str(n) for n in (below, below + per_pass) if n)
                raise UserError(
                    f"{name}={value} is not a multiple of batch.micro*parallel.dp "
                    f"= {self.micro}*{dp} = {per_pass}",
                    hint=f"use {name}={near}",
                )
        return size // per_pass


_RAMPUP = ("batch.rampup's start", "batch.rampup's increment")
