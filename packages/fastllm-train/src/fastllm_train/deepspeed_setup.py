"""Round DeepSpeed: quiet, without a compiler, with fp16 on any CPU, and a full disk by its name."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_PROBE_BYTES = 2**20


def import_deepspeed(device: str) -> ModuleType:
    """DeepSpeed, with its log on stderr and without a compiler.

    On CPU it would build ``deepspeed_shm_comm`` with g++ at the first ``init_distributed`` (half a
    minute); gloo does that work here.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates; nothing a user can do.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as buildable

    buildable["deepspeed_shm_comm"] = False
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return deepspeed


def take_over_process_group(deepspeed: ModuleType) -> None:
    """DeepSpeed's collectives go through the process group that the job has joined."""
    import torch.distributed as dist

    deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
    )


def allow_fp16_on_cpu() -> None:
    """DeepSpeed 0.19 refuses fp16 where the CPU has no instructions for it. torch computes it on
    any, slowly: enough to try a run out."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    assert accelerator is not None
    accelerator.is_fp16_supported = lambda: True


@contextmanager
def torch_writes(folder: Path) -> Iterator[None]:
    """Makes ``OSError`` of what ``torch.save`` raises when it cannot write into ``folder``. torch
    does not say why ("unexpected pos 3456 vs 3348"); trying again, in Python, does."""
    try:
        yield
    except RuntimeError as error:
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
            _write_a_little(folder)
            raise OSError(f"torch.save could not write: {error}") from error
        raise


def _write_a_little(folder: Path) -> None:
    """``OSError`` where the disk is full: of this, its own text names the reason."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
