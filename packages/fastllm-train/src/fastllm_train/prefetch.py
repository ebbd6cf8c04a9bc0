"""Reading the next steps' samples in worker processes, while the step before them is computed.

A worker is asked for "the step that starts at sample n", which is all it needs to know: the order
stays a function of the samples consumed, and a jump (going back, resuming) starts the workers anew.
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import RawValue
from threading import Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastllm_train.data import MicroBatch, SampleSource, read_step
from fastllm_train.errors import UserError
from fastllm_train.layout import BatchConfig
from fastllm_train.run_folder import leave_locks

Read = Callable[[SampleSource, int, BatchConfig, int, int, int], list[MicroBatch]]
STEPS_AHEAD = 2  # per worker
LOOK_S = 1.0  # between a worker's looks at its rank


class StepReader:
    """One replica's micro-batches of any step. ``workers`` 0 reads when asked."""

    def __init__(
        self,
        source: SampleSource,
        batch: BatchConfig,
        dp: int,
        dp_rank: int,
        vocab: int,
        workers: int = 0,
        read: Read = read_step,
    ) -> None:
        self._batch, self._workers = batch, workers
        self._read = lambda consumed: read(source, consumed, batch, dp, dp_rank, vocab)
        self._ahead: Iterator[list[MicroBatch] | UserError] | None = None
        self._next = -1
        self._ended = RawValue("b", 0)  # shared with the workers

    def read(self, consumed: int) -> list[MicroBatch]:
        """The step after ``consumed`` samples. ``UserError`` for bad data or a dead worker."""
        if not self._workers:
            return self._read(consumed)
        if self._ahead is None or consumed != self._next:
            self._ahead = self._start(consumed)
        try:
            found = next(self._ahead)
        except RuntimeError as error:
            raise worker_died(error) from error
        if isinstance(found, UserError):
            raise found
        self._next = consumed + self._batch.size_at(consumed)
        return found

    def close(self) -> None:
        """End the workers; nothing can be read afterwards."""
        self._end()
        self._ahead = None
        atexit.unregister(self._end)

    def _end(self) -> None:
        self._ended.value = 1

    def _start(self, consumed: int) -> Iterator[list[MicroBatch] | UserError]:
        if self._ahead is None:
            atexit.register(self._end)  # before multiprocessing's own, which waits for workers
        self._ahead = None  # the workers from before end here
        loader: DataLoader[list[MicroBatch] | UserError] = DataLoader(
            _Steps(self._read),
            batch_size=None,
            sampler=_Starts(self._batch, consumed),
            num_workers=self._workers,
            prefetch_factor=STEPS_AHEAD,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_settle_worker, self._ended, os.getpid()),
            multiprocessing_context="fork",  # datasets are mapped files and closures
            generator=torch.Generator(),  # of workers' seeds; else each start draws from the run's
        )
        return iter(loader)


def worker_died(error: RuntimeError) -> UserError:
    """torch's error about its workers as ours; any other is raised again."""
    if "DataLoader worker" not in str(error):
        raise error
    return UserError(
        f"a process that reads the data died: {error}",
        hint="often memory ran out (dmesg says so); the last checkpoint is intact: run again, "
        "or with data.workers=0",
    )


class _Steps(Dataset[list[MicroBatch] | UserError]):
    """Item ``consumed``: that step's micro-batches, or what is wrong with them."""

    def __init__(self, read: Callable[[int], list[MicroBatch]]) -> None:
        self._read = read

    def __getitem__(self, consumed: int) -> list[MicroBatch] | UserError:
        try:
            return self._read(consumed)
        except UserError as error:
            return UserError(str(error), hint=error.hint)


class _Starts(Sampler[int]):
    """Where the steps after ``consumed`` start, without end."""

    def __init__(self, batch: BatchConfig, consumed: int) -> None:
        self._batch, self._consumed = batch, consumed

    def __iter__(self) -> Iterator[int]:
        consumed = self._consumed
        while True:
            yield consumed
            consumed += self._batch.size_at(consumed)


def _as_it_is(step: list[MicroBatch] | UserError) -> list[MicroBatch] | UserError:
    return step


def _settle_worker(ended: Any, rank_pid: int, worker: int) -> None:
    """A scheduler's SIGTERM reaches every process of a job. The rank answers it; a worker obeys
    only when the rank has said that it is done. The run's lock must not live on in a worker whose
    rank is gone, nor may the worker itself."""
    del worker
    Thread(target=_end_with, args=(rank_pid,), name="end-with-rank", daemon=True).start()

    def obey(number: int, frame: object) -> None:
        del number, frame
        if ended.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, obey)
    leave_locks()


def _end_with(rank_pid: int) -> None:
    """torch's workers look whether their parent changes from what it was when they began to look: a
    rank that is killed before that leaves one that waits for ever."""
    while os.getppid() == rank_pid:
        time.sleep(LOOK_S)
    os._exit(1)
