"""One rank of a run that may be killed at any moment. Usage: kill_worker.py CONFIG.json."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fastllm_train.config import build_config


def main() -> None:
    from fastllm_train import loop
    from fastllm_train.distributed import join, leave, place_from_env
    from fastllm_train.peak import Peak

    loop.job_peak = lambda *_: Peak(1.0, "datasheet")  # it would take longer than the training
    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu")
    config = build_config(json.loads(Path(sys.argv[1]).read_text()))
    loop.train(config, config.model.resolve(), "cpu", loop.StopRequest())
    leave()
