"""Seeds of random numbers, by Megatron-LM's rules."""

from __future__ import annotations

import itertools

from fastllm_train.layout import ParallelConfig
from fastllm_train.seeds import rank_seeds

PARALLEL = ParallelConfig(dp=4, ep=2, tp=2, pp=2, cp=2)


def test_seeds_are_megatron_s() -> None:
    """initialize.py: seed + 100·stage; random.py: tensor-parallel ranks from 2718 above it on."""
    found = {
        (at.pp, at.tp): rank_seeds(1234, at)
        for at in map(PARALLEL.coordinates, range(PARALLEL.world_size))
    }
    assert found == {
        (0, 0): (1234, 3952),
        (0, 1): (1234, 3953),
        (1, 0): (1334, 4052),
        (1, 1): (1334, 4053),
    }


def test_who_draws_alike() -> None:
    """``replicated``: all ranks of a stage. ``divided``: those with the same part of tensors."""
    places = [PARALLEL.coordinates(rank) for rank in range(PARALLEL.world_size)]
    for one, other in itertools.combinations(places, 2):
        seeds, others = rank_seeds(1, one), rank_seeds(1, other)
        assert (seeds.replicated == others.replicated) == (one.pp == other.pp)
        assert (seeds.divided == others.divided) == (one.pp == other.pp and one.tp == other.tp)


def test_no_two_streams_are_one() -> None:
    """For fewer than 2718 / 100 stages, as in Megatron-LM."""
    wide = ParallelConfig(tp=8, pp=16)
    places = {(at.pp, at.tp): at for at in map(wide.coordinates, range(wide.world_size))}
    replicated = {rank_seeds(5, at).replicated for at in places.values()}
    divided = {rank_seeds(5, at).divided for at in places.values()}
    assert len(replicated) == 16
    assert len(divided) == 128
    assert not replicated & divided
