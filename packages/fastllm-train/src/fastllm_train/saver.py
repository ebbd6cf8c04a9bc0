"""When and how a run's checkpoints are written, in turn or beside the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from fastllm_planner.arch import ArchSpec, count_params
from fastllm_train import checkpoint
from fastllm_train.config import Config
from fastllm_train.coordination import on_rank_0, say
from fastllm_train.deepspeed_config import effective_zero_stage
from fastllm_train.engine import Engine
from fastllm_train.errors import PeerError, UserError
from fastllm_train.optimizer import MOMENTS
from fastllm_train.sinks import Journal

NEAR_S = 0.05  # between looks at a save that must be waited for


class Writing:
    """This rank's part of a checkpoint on its way to disk, in a thread."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        self.step = step
        self.start = time.perf_counter()
        self.held_s = 0.0  # how long the training waited for the copy
        self.error: OSError | None = None
        self._write = write
        # A daemon: a run that ends in an error does not wait for what it will not publish.
        self._thread = Thread(target=self._run, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def state(self) -> float:
        """1 written, 0 under way, -1 failed."""
        if self._thread.is_alive():
            return 0.0
        return 1.0 if self.error is None else -1.0

    def _run(self) -> None:
        try:
            self._write()
        except OSError as error:  # the training thread raises it, on all ranks together
            self.error = error


@dataclass
class Saver:
    """Writes checkpoints of ``engine`` under ``root``; every method is collective.

    With ``checkpoint.background`` a save copies the state to host memory and returns; a thread on
    every rank writes it, and ``poll`` publishes it when all have. One is under way at a time.
    """

    config: Config
    spec: ArchSpec
    engine: Engine
    root: Path
    journal: Journal | None
    newest: Path | None = None
    _writing: Writing | None = field(default=None, init=False)

    def save(self, step: int, state: dict[str, Any], *, wait: bool) -> None:
        """Save the state after ``step``. On return it is durable, or under way in the background;
        ``wait``: durable in any case."""
        self.finish()
        start = time.perf_counter()
        tag = checkpoint.tag_of(step)
        needed = checkpoint_bytes(self.config, self.spec)
        on_rank_0(lambda: checkpoint.require_space(checkpoint.saving_folder(self.root), needed))
        folder = self.root / checkpoint.SAVING / tag
        if not self.config.checkpoint.background:
            self._agree(step, self._write(folder, state))
            self._publish(step, start, time.perf_counter() - start)
            return
        write = self.engine.snapshot(state)
        self._writing = Writing(step, lambda: write(folder))
        held = self._writing.held_s = time.perf_counter() - start
        say(f"checkpoint of step {step}: copied in {held:.1f} s, writing in the background")
        if wait:
            self.finish()

    def poll(self) -> None:
        """Publish a checkpoint that all ranks have written. Call it between steps."""
        if self._writing is not None:
            self._settle(self._slowest())

    def finish(self) -> None:
        """Wait for a checkpoint under way, and publish it."""
        while self._writing is not None:
            self._settle(self._slowest())
            if self._writing is not None:
                time.sleep(NEAR_S)

    def _slowest(self) -> float:
        assert self._writing is not None
        state = torch.tensor(self._writing.state(), device=self._device())
        dist.all_reduce(state, op=dist.ReduceOp.MIN)
        return float(state)

    def _write(self, folder: Path, state: dict[str, Any]) -> OSError | None:
        try:
            self.engine.save(folder, state)
        except OSError as error:
            if self._format() == "deepspeed":
                # The other ranks may wait inside DeepSpeed, where none of them hears of it: this
                # one ends, and the launcher ends the job.
                raise _failure(checkpoint.step_of(folder.name) or 0, error) from error
            return error
        return None

    def _format(self) -> str:
        return checkpoint.written_format(self.config)

    def _agree(self, step: int, error: OSError | None) -> None:
        """All ranks have written, or all end: one that failed must not leave the others waiting."""
        failed = torch.tensor(float(error is not None), device=self._device())
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed:
            raise _failure(step, error)

    def _settle(self, state: float) -> None:
        writing = self._writing
        assert writing is not None
        if state < 0:
            self._writing = None
            raise _failure(writing.step, writing.error)
        if state > 0:
            self._writing = None
            self._publish(writing.step, writing.start, writing.held_s)

    def _publish(self, step: int, start: float, held_s: float) -> None:
        tag = checkpoint.tag_of(step)
        layout = deepspeed_layout(self.config) if self._format() == "deepspeed" else None
        on_rank_0(lambda: checkpoint.publish(self.root, tag, layout))
        on_rank_0(lambda: checkpoint.prune(self.root, self.config.checkpoint.keep_last))
        seconds = time.perf_counter() - start
        if self.journal is not None:
            times = {"seconds": seconds, "held_s": held_s}
            self.journal.write({"kind": "checkpoint", "step": step, **times})
        self.newest = self.root / tag
        say(f"checkpoint {self.newest} ({seconds:.1f} s)")

    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _failure(step: int, error: OSError | None) -> Exception:
    if error is None:
        return PeerError(f"another rank could not write the checkpoint of step {step}")
    return UserError(
        f"the checkpoint of step {step} could not be written: {error}",
        hint="the previous checkpoint is intact: make room, then run the same command again",
    )


def checkpoint_bytes(config: Config, spec: ArchSpec) -> int:
    """Size of a checkpoint, a little rounded up: fp32 master and moments, the model's own copy."""
    copies = 1 + len(MOMENTS[config.optim.name])
    portable_only = checkpoint.written_format(config) == "portable"
    own = 0 if portable_only else config.precision.torch_dtype.itemsize
    return int(1.02 * count_params(spec) * (4 * copies + own)) + 2**20


def deepspeed_layout(config: Config) -> dict[str, object]:
    """What DeepSpeed's own checkpoints are bound to."""
    parallel, stage = config.parallel, effective_zero_stage(config)[0]
    sizes: dict[str, object] = {name: getattr(parallel, name) for name in ("dp", "tp", "pp", "cp")}
    nvme = {"offload": "nvme"} if parallel.nvme_path else {}
    return {**sizes, "zero_stage": stage, "dtype": config.precision.dtype, **nvme}
