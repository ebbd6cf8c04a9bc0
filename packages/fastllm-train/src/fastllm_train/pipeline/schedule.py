"""The order in which a stage runs micro-batches: one forward, one backward (1F1B; Narayanan et al.
2021, arXiv:2104.04473, section 2.2.1). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple


class Action(NamedTuple):
    kind: Literal["forward", "backward"]
    micro_batch: int


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    """At most ``stages - stage`` micro-batches are in flight on ``stage``: the last stage goes back
    at once, the first after every stage has one. With one stage: forward, backward, in turn."""
    ahead = min(stages - stage - 1, micro_batches)
    for index in range(ahead):
        yield Action("forward", index)
    for index in range(micro_batches):
        if index + ahead < micro_batches:
            yield Action("forward", index + ahead)
        yield Action("backward", index)
