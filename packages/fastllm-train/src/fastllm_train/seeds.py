"""Seeds of a rank's random numbers, by Megatron-LM's rules (training/initialize.py and
tensor_parallel/random.py).

Weights do not come from these: each tensor has a generator of its own (``models.initialise``), so
that every layout starts from the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

from fastllm_train.layout import Coordinates


class Seeds(NamedTuple):
    """``replicated`` is the same on all tensor-parallel ranks and replicas of a pipeline stage: for
    what they must draw alike. ``divided`` differs from one tensor-parallel rank to the next: for
    what each draws for its own part."""

    replicated: int
    divided: int


def rank_seeds(seed: int, at: Coordinates) -> Seeds:
    """seed + 100·stage, and that + 2718 + tensor-parallel rank."""
    replicated = seed + 100 * at.pp
    return Seeds(replicated, replicated + 2718 + at.tp)
