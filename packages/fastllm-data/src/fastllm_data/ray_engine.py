"""Shards on a Ray cluster: the extra ``fastllm-data[ray]``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastllm_data.errors import UserError
from fastllm_data.options import TokenizeOptions
from fastllm_data.remote import is_url

RETRIES = 5  # of a shard whose worker or node died; it goes on from its last checkpoint
SHARDS_PER_CPU = 4  # enough that the last ones to finish do not keep the rest waiting


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError("--engine ray needs Ray", "pip install 'fastllm-data[ray]'") from error


def connect() -> Callable[[], None]:
    """Join the cluster at RAY_ADDRESS, or start one on this machine; returns what ends it."""
    ray = _ray()
    if ray.is_initialized():
        return lambda: None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"include_dashboard": False}
    ray.init(address=address, logging_level="warning", log_to_driver=False, **local)
    return ray.shutdown


def cluster_cpus() -> int:
    return int(_ray().cluster_resources().get("CPU", 1))


def run_on_ray(options: TokenizeOptions, missing: list[int], shards: int) -> None:
    """Do shards on the cluster; ``options.workers`` CPUs each. Nodes must see the same files.

    A shard whose process or node dies is done again elsewhere. Raises UserError when one fails.
    """
    ray = _ray()
    absolute = _absolute(options)

    def shard_task(shard: int) -> int:
        from fastllm_data.shards import run_shard

        run_shard(absolute, shard, shards)
        return shard

    task: Any = ray.remote(num_cpus=options.workers, max_retries=RETRIES)(shard_task)
    waiting: dict[Any, int] = {task.remote(shard): shard for shard in missing}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        shard = waiting.pop(ready)
        try:
            ray.get(ready)
        except ray.exceptions.RayError as error:
            for other in waiting:
                ray.cancel(other)
            cause = getattr(error, "cause", None) or error
            hint = getattr(cause, "hint", "") or "--resume goes on with the shards that are left"
            said = str(cause).strip().splitlines()
            raise UserError(f"shard {shard}: {said[-1] if said else cause!r}", hint) from error


def _absolute(options: TokenizeOptions) -> TokenizeOptions:
    """With paths that mean the same in a worker's working directory."""
    inputs = tuple(i if is_url(i) else str(Path(i).absolute()) for i in options.inputs)
    return replace(
        options,
        inputs=inputs,
        tokenizer=options.tokenizer.absolute(),
        out=options.out.absolute(),
        merges=None if options.merges is None else options.merges.absolute(),
    )
