"""Runs killed with SIGKILL at random moments: a few here, more by ``kill_trials.py`` itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import kill_trials
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("mode", kill_trials.MODES)
def test_no_kill_loses_a_checkpoint_and_the_run_ends_as_if_never_killed(mode: str) -> None:
    done = subprocess.run(
        [sys.executable, kill_trials.__file__, mode, "3"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout)["kills"] == 3
