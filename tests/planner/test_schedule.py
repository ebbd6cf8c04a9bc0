"""The drawn pipeline schedule obeys the pipeline's rules and its textbook bubble."""

from __future__ import annotations

import itertools

import pytest

from fastllm_planner.report.schedule import Pass, bubble_share, simulate

SIZES = [(1, 4, 1), (2, 2, 1), (4, 8, 1), (4, 3, 1), (8, 16, 1), (4, 8, 2), (4, 4, 3), (2, 8, 5)]


def by_pass(passes: list[Pass]) -> dict[tuple[str, int, int], Pass]:
    """(kind, virtual stage, micro-batch) → pass."""
    ranks = 1 + max(p.rank for p in passes)
    return {(p.kind, p.chunk * ranks + p.rank, p.micro_batch): p for p in passes}


@pytest.mark.parametrize(("ranks", "micro", "chunks"), SIZES)
def test_every_pass_runs_once_after_what_it_needs(ranks: int, micro: int, chunks: int) -> None:
    passes = simulate(ranks, micro, chunks)
    found = by_pass(passes)
    stages = ranks * chunks
    assert len(passes) == len(found) == 2 * stages * micro
    for (kind, stage, m), one in found.items():
        if kind == "forward" and stage:
            assert one.start >= found["forward", stage - 1, m].end
        if kind == "backward":
            assert one.start >= found["forward", stage, m].end
            if stage < stages - 1:
                assert one.start >= found["backward", stage + 1, m].end
    for rank in range(ranks):
        own = sorted((p for p in passes if p.rank == rank), key=lambda p: p.start)
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(own))


@pytest.mark.parametrize(("ranks", "micro", "chunks"), SIZES)
def test_bubble_is_the_textbook_share(ranks: int, micro: int, chunks: int) -> None:
    # (p-1) / (m·v + p-1): arXiv:2104.04473 §2.2, as a share of the whole.
    expected = (ranks - 1) / (micro * chunks + ranks - 1)
    assert bubble_share(simulate(ranks, micro, chunks), ranks) == pytest.approx(expected)


def test_1f1b_holds_at_most_the_remaining_depth_in_flight() -> None:
    passes = simulate(4, 16, 1)
    for rank in range(4):
        events = sorted(
            (p.end, -1) if p.kind == "backward" else (p.start, 1) for p in passes if p.rank == rank
        )
        held = peak = 0
        for _, change in events:
            held += change
            peak = max(peak, held)
        assert peak == 4 - rank
