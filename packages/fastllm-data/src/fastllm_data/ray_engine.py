"""Shards on a Ray cluster: the extra ``fastllm-data[ray]``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastllm_data.errors import UserError
from fastllm_data.inputs import Source
from fastllm_data.options import TokenizeOptions
from fastllm_data.progress import Progress
from fastllm_data.remote import is_url

RETRIES = 5  # of a shard whose worker or node died; it goes on from its last checkpoint
POLL_SECONDS = 1.0
SHARDS_PER_CPU = 4  # enough that the last ones to finish do not keep the rest waiting


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError("--engine ray needs Ray", "pip install 'fastllm-data[ray]'") from error


@contextmanager
def cluster() -> Generator[None]:
    """The cluster at RAY_ADDRESS, or one started on this machine; or the one joined already."""
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"include_dashboard": False}
    # Ray says on stdout which tasks it runs again; that is for what the command prints.
    with redirect_stdout(sys.stderr):
        ray.init(address=address, logging_level="warning", log_to_driver=False, **local)
        try:
            yield
        finally:
            ray.shutdown()


def default_shards(workers: int) -> int:
    """Some for each worker of the cluster."""
    cpus = int(_ray().cluster_resources().get("CPU", 1))
    return max(1, SHARDS_PER_CPU * cpus // workers)


def run_on_ray(options: TokenizeOptions, missing: list[int], plan: list[list[Source]]) -> None:
    """Do shards on the cluster; ``options.workers`` CPUs each. Nodes must see the same files.

    A shard whose process or node dies is done again elsewhere. Raises UserError when one fails.
    """
    ray = _ray()
    absolute = _absolute(options)
    shards = len(plan)

    def shard_task(shard: int) -> dict[str, int]:
        from fastllm_data.shards import run_shard

        return run_shard(absolute, shard, shards).counts

    task: Any = ray.remote(num_cpus=options.workers, max_retries=RETRIES)(shard_task)
    waiting: dict[Any, int] = {task.remote(shard): shard for shard in missing}
    sizes = [sum(source.stop - source.begin for source in part) for part in plan]
    counts: dict[str, int] = dict.fromkeys(("documents", "tokens", "bad_lines", "input_bytes"), 0)
    with Progress(sum(sizes)) as progress:
        progress.pass_over(sum(sizes) - sum(sizes[shard] for shard in missing))
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_SECONDS)
            for task_id in ready:
                shard = waiting.pop(task_id)
                try:
                    done: dict[str, int] = ray.get(task_id)
                except ray.exceptions.RayError as error:
                    for other in waiting:
                        ray.cancel(other)
                    raise _failed(shard, error) from error
                counts = {name: n + done[name] for name, n in counts.items()}
                progress.meter.bytes += sizes[shard]
            progress.update(counts)


def _failed(shard: int, error: Exception) -> UserError:
    cause = getattr(error, "cause", None) or error
    hint = getattr(cause, "hint", "") or "--resume goes on with the shards that are left"
    said = str(cause).strip().splitlines()
    return UserError(f"shard {shard}: {said[-1] if said else repr(cause)}", hint)


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
