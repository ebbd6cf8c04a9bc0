"""Workers that read ahead: the same batches, errors as errors, a dead worker at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm_train.data import SampleSource, SyntheticSamples, read_step
from fastllm_train.errors import UserError
from fastllm_train.layout import BatchConfig
from fastllm_train.prefetch import STEPS_AHEAD, StepReader

GROWING = BatchConfig(2, 12, 16, (4, 4, 20))


def reader(workers: int, vocab: int = 100, **more: Any) -> StepReader:
    source: SampleSource = SyntheticSamples(64, 16, 100, seed=3)
    return StepReader(source, GROWING, 2, 1, vocab, workers, **more)


def test_workers_read_what_is_read_without_them_also_after_a_jump() -> None:
    alone, ahead = reader(0), reader(2)
    consumed = 0
    for step in range(8):
        if step == 5:
            consumed = 4  # back to the second step
        got, want = ahead.read(consumed), alone.read(consumed)
        assert len(got) == len(want) == GROWING.size_at(consumed) // 4
        for one, other in zip(got, want, strict=True):
            assert np.array_equal(one.tokens, other.tokens)
        consumed += GROWING.size_at(consumed)
    ahead.close()
    assert not multiprocessing.active_children()


def test_a_process_ends_with_its_workers_also_after_an_error() -> None:
    code = "from test_prefetch import reader\nahead = reader(1)\nahead.read(0)\nraise SystemExit(3)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, timeout=120)
    assert done.returncode == 3


ORPHAN = """
import os, signal
from fastllm_train import prefetch
from test_prefetch import reader

rank, settle = os.getpid(), prefetch._settle_worker

def late(*arguments):
    while os.getppid() == rank:
        pass
    settle(*arguments)

prefetch._settle_worker = late
ahead = reader(1)
ahead._ahead = ahead._start(0)
os.kill(rank, signal.SIGKILL)
"""


def test_a_worker_does_not_outlive_a_rank_that_is_killed_as_it_starts_one() -> None:
    """The worker holds this test's pipe: it is read to its end only when the worker is gone."""
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], cwd=folder, capture_output=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_what_is_wrong_with_the_data_is_said_as_without_workers() -> None:
    ahead = reader(1, vocab=50)
    with pytest.raises(UserError, match=r"vocabulary has 50 entries$"):
        ahead.read(0)
    ahead.close()


def test_a_dead_worker_is_an_error_and_no_hang() -> None:
    def read(source: Any, consumed: int, *rest: Any) -> Any:
        if consumed:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_step(source, consumed, *rest)

    ahead = reader(1, read=read)
    start = time.monotonic()
    with pytest.raises(UserError, match="a process that reads the data died"):
        _ = [ahead.read(consumed) for consumed in (0, 4)]
    assert time.monotonic() - start < 30
    ahead.close()


def test_a_scheduler_s_notice_does_not_end_a_worker() -> None:
    before = set(multiprocessing.active_children())
    ahead = reader(1)
    ahead.read(0)
    (worker,) = set(multiprocessing.active_children()) - before
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    consumed = 0
    for _ in range(STEPS_AHEAD + 3):  # more than were read before the signal
        consumed += GROWING.size_at(consumed)
        assert len(ahead.read(consumed)) == GROWING.size_at(consumed) // 4
    assert worker.is_alive()
    ahead.close()
