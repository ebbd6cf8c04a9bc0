"""A job in which nothing moves: who is where, and an end."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hang_worker
import pytest

from fastllm_train import watchdog
from fastllm_train.launch import listening_socket, worker_environment
from fastllm_train.watchdog import EXIT_STATUS, REPORT, Standing, Watchdog, describe

FAILS_S = 60.0  # what is waited for has then not come


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sleep", "stop"])
def test_a_rank_that_hangs_is_named_with_the_operation_the_others_wait_in(
    fault: str, tmp_path: Path
) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with listening_socket() as listening:
        port, fd = listening.getsockname()[1], listening.fileno()
        ranks = [
            subprocess.Popen(
                [sys.executable, hang_worker.__file__, str(tmp_path), fault],
                env=worker_environment(env, rank, 2, port, store_fd=fd),
                pass_fds=(fd,) if rank == 0 else (),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
    try:
        log = ranks[0].communicate(timeout=120)[1]
    finally:
        for rank in ranks:
            rank.kill()
        ranks[1].communicate()
    assert ranks[0].returncode == EXIT_STATUS, log
    report = log[log.index("error: nothing moved for 2 s in all_reduce") :]
    assert "rank 0: step 3, after reading data: waits in all_reduce (engine_step.py" in report
    assert "hint: look at the machine of rank 1: the others wait for it" in report
    if fault == "sleep":
        here = "rank 1: step 3, after the step before: is in no collective operation"
        assert f"{here} (prefetch.py" in report
    else:
        assert "rank 1: no sign (stopped, frozen, or gone)" in report


class Clock:
    """The watchdog's: it stands still until it is moved, and counts how often it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0
        self._looks, self._changed = 0, threading.Condition()

    def monotonic(self) -> float:
        with self._changed:
            if threading.current_thread() is not threading.main_thread():
                self._looks += 1
                self._changed.notify_all()
            return self.now

    def move(self, seconds: float) -> None:
        """And wait until the watching thread has seen it."""
        with self._changed:
            self.now += seconds
            enough = self._looks + 2  # the first may have been under way
            assert self._changed.wait_for(lambda: self._looks >= enough, timeout=FAILS_S)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    times = SimpleNamespace(monotonic=found.monotonic, time=time.time, sleep=time.sleep)
    monkeypatch.setattr(watchdog, "time", times)
    return found


def test_a_rank_that_goes_on_is_left_alone(tmp_path: Path, clock: Clock) -> None:
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    watching = Watchdog(tmp_path, 0, 1, 0.4, grace_s=0.1, end=ended.put)
    watching.start()
    for step in range(5):
        watching.note("a part", step)
        clock.move(0.39)
    assert ended.empty()
    clock.now += 0.02
    assert ended.get(timeout=FAILS_S) == EXIT_STATUS


def test_a_save_may_take_longer_than_a_step(tmp_path: Path, clock: Clock) -> None:
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    watching = Watchdog(tmp_path, 0, 1, 0.2, grace_s=0.1, end=ended.put)
    watching.start()
    watching.note("the step's update", limit_s=30.0)
    clock.move(29.0)
    assert ended.empty()
    watching.note("the step before", 2)  # the save is over: the ordinary time-out again
    clock.move(0.1)
    assert ended.empty()
    clock.now += 0.2
    assert ended.get(timeout=FAILS_S) == EXIT_STATUS


def test_no_rank_ends_before_the_report_is_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that goes breaks the connections of the one that writes the report."""
    may_write, awaited = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> str:
        assert may_write.wait(FAILS_S)
        return describe(*arguments)

    def looked_for(file: Path, newer_than_s: float) -> bool:
        if file.name == REPORT:
            awaited.set()
        return is_recent(file, newer_than_s)

    is_recent = watchdog._is_recent
    monkeypatch.setattr(watchdog, "describe", slow)
    monkeypatch.setattr(watchdog, "_is_recent", looked_for)
    report = tmp_path / "hang" / REPORT
    seen: list[bool] = []
    ranks = [
        Watchdog(
            tmp_path, rank, 2, 0.1, grace_s=FAILS_S, end=lambda _: seen.append(report.exists())
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    assert awaited.wait(FAILS_S)  # rank 1 has spoken; rank 0 has it to say what it has found
    assert not seen
    may_write.set()
    for rank in ranks:
        rank.stop()
    assert seen == [True, True]


def test_the_report_tells_ranks_that_wait_in_different_operations() -> None:
    found = {
        0: Standing(0, 7, "forward", "recv", "pipeline/exchange.py:84 _receive", 61.0),
        1: Standing(1, 7, "backward", "all_reduce", "engine_deepspeed.py:200 _global_sum", 60.5),
    }
    text = describe(found, 2, 60, "run.save_timeout_s")
    assert text.endswith("or raise run.save_timeout_s\n")
    assert text.startswith("error: nothing moved for 60 s in all_reduce, recv\n")
    assert "all ranks wait, in different operations" in text
    assert text.count("\n") == 4
