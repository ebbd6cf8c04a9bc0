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
    """Sequences per step. ``global`` in TOML; ``seq_len`` in tokens."""

    micro: int = 1
    global_size: int = field(default=1, metadata={"key": "global"})
    seq_len: int = 1024

    def __post_init__(self) -> None:
        for name, key in (("micro", "micro"), ("global_size", "global"), ("seq_len", "seq_len")):
            if getattr(self, name) < 1:
                raise UserError(f"batch.{key}={getattr(self, name)} is not a positive number")

    def accumulation(self, dp: int) -> int:
        """Micro-batches per device and step. ``UserError`` when they do not come out even."""
        per_pass = self.micro * dp
        if self.global_size % per_pass:
            below = self.global_size // per_pass * per_pass
            near = " or ".join(str(n) for n in (below, below + per_pass) if n)
            raise UserError(
                f"batch.global={self.global_size} is not a multiple of batch.micro*parallel.dp "
                f"= {self.micro}*{dp} = {per_pass}",
                hint=f"use batch.global={near}",
            )
        return self.global_size // per_pass
