"""The pipeline schedule as boxes in time: 1F1B, and Megatron's interleaved 1F1B.

Each rank runs a fixed order of forward and backward passes (Narayanan et al. arXiv:2104.04473
§2.2); a pass starts when its rank is free and the pass that it needs has ended. Times are in units
of one rank's forward pass of one micro-batch; communication is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "backward"]


@dataclass(frozen=True)
class Pass:
    """One pass of a model chunk on a rank, from ``start`` to ``end``. Indices from 0."""

    rank: int
    chunk: int
    micro_batch: int
    kind: Kind
    start: float
    end: float


@dataclass(frozen=True)
class _Step:
    kind: Kind
    chunk: int
    micro_batch: int


def simulate(ranks: int, micro_batches: int, chunks: int, backward_cost: float = 2.0) -> list[Pass]:
    """Every pass of a schedule. ``chunks``: model chunks per rank (virtual stages).

    Interleaving needs ``micro_batches`` to be a multiple of ``ranks``.
    """
    orders = [_order(rank, ranks, micro_batches, chunks) for rank in range(ranks)]
    ends: dict[tuple[int, _Step], float] = {}
    clocks = [0.0] * ranks
    position = [0] * ranks
    passes: list[Pass] = []
    remaining = sum(len(order) for order in orders)
    while remaining:
        before = remaining
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                step = order[position[rank]]
                ready = _ready_at(rank, step, ranks, chunks, ends)
                if ready is None:
                    break
                start = max(clocks[rank], ready)
                cost = (1.0 if step.kind == "forward" else backward_cost) / chunks
                ends[rank, step] = clocks[rank] = start + cost
                passes.append(
                    Pass(rank, step.chunk, step.micro_batch, step.kind, start, start + cost)
                )
                position[rank] += 1
                remaining -= 1
        if remaining == before:
            raise RuntimeError("the schedule waits for itself")
    return passes


def bubble_share(passes: list[Pass], ranks: int) -> float:
    """Share of the ranks' time in which they wait."""
    length = max(p.end for p in passes)
    busy = sum(p.end - p.start for p in passes)
    return 1.0 - busy / (length * ranks)


def _ready_at(
    rank: int, step: _Step, ranks: int, chunks: int, ends: dict[tuple[int, _Step], float]
) -> float | None:
    """When the pass that feeds ``step`` has ended; None while it has not run."""
    virtual = step.chunk * ranks + rank
    last = ranks * chunks - 1
    if step.kind == "forward":
        if virtual == 0:
            return 0.0
        source, kind = virtual - 1, step.kind
    elif virtual == last:
        source, kind = virtual, "forward"
    else:
        source, kind = virtual + 1, step.kind
    needed = _Step(kind, source // ranks, step.micro_batch)
    return ends.get((source % ranks, needed))


def _order(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[_Step]:
    """Warm-up forwards, then one forward and one backward in turn, then the last backwards."""
    forwards = _sequence("forward", ranks, micro_batches, chunks)
    backwards = _sequence("backward", ranks, micro_batches, chunks)
    warm_up = ranks - rank - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * ranks
    warm_up = min(warm_up, len(forwards))
    order = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - warm_up :]


def _sequence(kind: Kind, ranks: int, micro_batches: int, chunks: int) -> list[_Step]:
    """Order of one rank's passes of a kind: groups of ``ranks`` micro-batches, chunk by chunk."""
    if chunks == 1:
        return [_Step(kind, 0, m) for m in range(micro_batches)]
    order = range(chunks) if kind == "forward" else reversed(range(chunks))
    turns = list(order)
    return [
        _Step(kind, chunk, group + m)
        for group in range(0, micro_batches, ranks)
        for chunk in turns
        for m in range(ranks)
    ]
