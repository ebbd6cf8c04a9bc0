"""Offload to files on NVMe (ZeRO-Infinity: Rajbhandari et al. 2021, arXiv:2104.07857).

DeepSpeed keeps each sub-group of a rank's optimizer states in files, reads one sub-group at a time,
updates it and writes it back; with parameters offloaded too, their partitions are files as well.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastllm_planner.arch import ArchSpec, iter_params
from fastllm_train.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastllm_train.config import Config

# Elements of a rank that are in host memory together while they are updated: DeepSpeed's 10^9 would
# take 16 GB of locked memory a rank.
SUB_GROUP = 100_000_000
_STATES = 4  # buffers: weight, gradient and two moments of one sub-group
_PARAMETERS = 5  # buffers: parameters read ahead of their use
_ALIGNED = 4096  # elements; of files that are read past the page cache
# Requests of 1 MiB, 32 in flight: what DeepSpeed's tuner finds on most drives.
_AIO = {
    "block_size": 2**20,
    "queue_depth": 32,
    "single_submit": False,
    "overlap_events": True,
    "intra_op_parallelism": 1,
}

T = TypeVar("T")


def swap_folder(config: Config) -> Path:
    """Under ``parallel.nvme_path``, one for each run's folder: runs do not see each other's."""
    name = hashlib.sha256(str(Path(config.run.out).resolve()).encode()).hexdigest()[:16]
    return Path(config.parallel.nvme_path) / f"fastllm-{name}"


def nvme_settings(config: Config) -> dict[str, Any]:
    """What the DeepSpeed configuration's ``zero_optimization`` gets, and ``aio`` beside it."""
    folder = {"device": "nvme", "nvme_path": str(swap_folder(config)), "pin_memory": False}
    zero: dict[str, Any] = {
        "sub_group_size": SUB_GROUP,
        "offload_optimizer": {**folder, "buffer_count": _STATES},
    }
    if config.parallel.offload == "optimizer+params":
        size = _largest_part(config, config.model.resolve())
        zero["offload_param"] = {**folder, "buffer_count": _PARAMETERS, "buffer_size": size}
    return {"zero_optimization": zero, "aio": dict(_AIO)}


def _largest_part(config: Config, spec: ArchSpec) -> int:
    """Elements of a rank's partition of the largest parameter, rounded up."""
    parallel = config.parallel
    ranks = parallel.dp * parallel.cp
    largest = max(p.numel for p in iter_params(spec))
    return -(-largest // (ranks * _ALIGNED)) * _ALIGNED


def prepare(config: Config) -> None:
    """The folder, and DeepSpeed's asynchronous reads and writes, which it compiles at first use.
    ``UserError`` where either cannot be had."""
    from fastllm_train.coordination import say  # not at the top: `check` needs no torch

    folder = swap_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"parallel.nvme_path={config.parallel.nvme_path}: {error.strerror or error}",
            hint="name a folder on a local drive that every node has and may write to",
        ) from error
    say(f"offload to files in {folder} (DeepSpeed compiles its async_io once, in minutes)")
    _load_async_io()


def remove(config: Config) -> None:
    """What a finished run left in ``parallel.nvme_path``. A run that was killed leaves its files;
    the next one in the same folder writes over them."""
    if config.parallel.nvme_path:
        shutil.rmtree(swap_folder(config), ignore_errors=True)


def _builder() -> Any:
    """The accelerator's own."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    assert accelerator is not None
    return accelerator.create_op_builder("AsyncIOBuilder")


def _load_async_io() -> None:
    builder = _builder()
    try:
        with warnings.catch_warnings():  # of setuptools, about the order of imports
            warnings.simplefilter("ignore")
            if not builder.is_compatible(verbose=False):
                raise RuntimeError("libaio is missing")
            builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else repr(error)
        raise UserError(
            f"parallel.nvme_path needs DeepSpeed's async_io, which cannot be built here: {reason}",
            hint="sudo apt install libaio-dev g++ ninja-build, or leave parallel.nvme_path out",
        ) from error


@contextmanager
def resident(optimizer: Any, sub_group: int, *, write: bool) -> Iterator[None]:
    """Sub-group ``sub_group`` of DeepSpeed's ZeRO-3 ``optimizer`` is in memory, and with ``write``
    goes back to its files. DeepSpeed's own accessors read the whole sub-group for every tensor of
    it; in here they find it in memory."""
    if not optimizer._swappable_optimizer_subgroup(sub_group):
        yield
        return
    swappable = optimizer._swappable_optimizer_subgroup
    optimizer._optimizer_states_and_gradient_swap_in(sub_group)
    optimizer._swappable_optimizer_subgroup = lambda i: i != sub_group and swappable(i)
    try:
        yield
    finally:
        del optimizer._swappable_optimizer_subgroup  # the method again
        if write:
            optimizer._optimizer_states_and_gradient_swap_out(sub_group)
        else:
            optimizer._release_swap_buffers(sub_group)


def by_sub_group(
    optimizer: Any, parameters: Iterable[tuple[T, torch.nn.Parameter]], *, write: bool
) -> Iterator[tuple[T, torch.nn.Parameter]]:
    """``parameters``, one sub-group after another, each resident while it is visited."""

    def place(pair: tuple[T, torch.nn.Parameter]) -> int:
        return optimizer.grad_position[optimizer.get_param_id(pair[1])][0]

    for sub_group, members in groupby(sorted(parameters, key=place), place):
        with resident(optimizer, sub_group, write=write):
            yield from members
