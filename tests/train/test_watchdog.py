"""A job in which nothing moves: who is where, and an end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hang_worker
import pytest

from fastllm_train import watchdog
from fastllm_train.launch import free_port, worker_environment
from fastllm_train.watchdog import EXIT_STATUS, REPORT, Standing, Watchdog, describe


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sleep", "stop"])
def test_a_rank_that_hangs_is_named_with_the_operation_the_others_wait_in(
    fault: str, tmp_path: Path
) -> None:
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, hang_worker.__file__, str(tmp_path), fault],
            env=worker_environment(env, rank, 2, port),
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
    assert "rank 0: step 3, after reading data: waits in all_reduce (engine_deepspeed.py" in report
    assert "hint: look at the machine of rank 1: the others wait for it" in report
    if fault == "sleep":
        here = "rank 1: step 3, after the step before: is in no collective operation"
        assert f"{here} (prefetch.py" in report
    else:
        assert "rank 1: no sign (stopped, frozen, or gone)" in report


def test_a_rank_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    ended: list[int] = []
    watching = Watchdog(tmp_path, 0, 1, 0.4, grace_s=0.1, end=ended.append)
    watching.start()
    for step in range(10):
        watching.note("a part", step)
        time.sleep(0.1)
    assert not ended
    time.sleep(1.0)
    assert ended == [EXIT_STATUS]


def test_a_save_may_take_longer_than_a_step(tmp_path: Path) -> None:
    ended: list[int] = []
    watching = Watchdog(tmp_path, 0, 1, 0.2, grace_s=0.1, end=ended.append)
    watching.start()
    watching.note("the step's update", limit_s=30.0)
    time.sleep(1.0)
    assert not ended
    watching.note("the step before", 2)  # the save is over: the ordinary time-out again
    time.sleep(1.0)
    assert ended == [EXIT_STATUS]


def test_no_rank_ends_before_the_report_is_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that goes breaks the connections of the one that writes the report."""

    def slow(*arguments: Any) -> str:
        time.sleep(0.3)
        return describe(*arguments)

    monkeypatch.setattr(watchdog, "describe", slow)
    report, seen = tmp_path / "hang" / REPORT, []
    ranks = [
        Watchdog(tmp_path, rank, 2, 0.2, grace_s=5.0, end=lambda _: seen.append(report.exists()))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    time.sleep(0.4)  # both report by now
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
