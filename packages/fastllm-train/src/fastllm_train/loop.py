"""The training loop on one rank: data in, steps, records, checkpoints, an orderly end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastllm_planner.arch import ArchSpec
from fastllm_train.config import Config, to_table
from fastllm_train.coordination import on_rank_0, say
from fastllm_train.data import read_step
from fastllm_train.distributed import runtime_line
from fastllm_train.engine import Engine, StepOutcome
from fastllm_train.engine_choice import build_engine
from fastllm_train.errors import PeerError, UserError
from fastllm_train.evaluation import mean_loss, validation_batches
from fastllm_train.metrics import (
    MetricsFile,
    StepRecord,
    Throughput,
    peak_memory_gib,
    run_record,
    step_line,
    step_values,
    throughput,
)
from fastllm_train.models.attention_core import attention_core, name_of_core
from fastllm_train.peak import job_peak
from fastllm_train.prefetch import StepReader, worker_died
from fastllm_train.profiling import ProfileWindow
from fastllm_train.rank_times import RankTimes
from fastllm_train.run_folder import RunFolder, lock
from fastllm_train.saver import Saver
from fastllm_train.schedule import learning_rate, planned_steps
from fastllm_train.seeds import rank_seeds
from fastllm_train.sinks import Journal, Sink, TensorBoardSink, WandbSink
from fastllm_train.spikes import SpikeWatch
from fastllm_train.start import (
    STATE_SCHEMA,
    Data,
    agree_on_checkpoint,
    open_data_in_turn,
    prepare_folder,
    pretrained,
    restore,
    start_again,
    start_of,
)
from fastllm_train.stop_request import StopRequest
from fastllm_train.watchdog import Watchdog

__all__ = ["Ending", "StopRequest", "train"]


@dataclass(frozen=True)
class Ending:
    """How a run ended: its last step, and whether a signal asked for it."""

    step: int
    stopped: bool
    checkpoint: Path | None


def train(
    config: Config, spec: ArchSpec, device: str, request: StopRequest, *, fresh: bool = False
) -> Ending:
    """Train from the newest checkpoint under ``run.out``, or from scratch, to the schedule's end.

    ``fresh`` deletes the run's checkpoints and metrics first.
    """
    folder, rank = RunFolder(Path(config.run.out)), dist.get_rank()
    on_rank_0(lambda: lock(folder))
    data = open_data_in_turn(config, spec)
    if fresh:
        on_rank_0(lambda: start_again(folder))
    found = agree_on_checkpoint(folder)
    torch.manual_seed(rank_seeds(config.run.seed, config.parallel.coordinates(rank)).replicated)
    start, weights = start_of(found.path, config, spec), None
    if found.path is None and config.model.weights:
        weights = pretrained(Path(config.model.weights), spec).weight
        say(f"weights from {config.model.weights}")
    if device == "cpu":
        say(runtime_line(os.environ, torch.get_num_threads()))
    else:
        core = attention_core(config.speed)
        say(f"attention: {name_of_core(core)}")
    timeout = config.run.hang_timeout_s
    watchdog = Watchdog(folder.root, rank, dist.get_world_size(), timeout)
    engine: Engine = build_engine(config, spec, device, start, weights, watchdog.note)
    step, consumed = 0, 0
    if found.path is not None:
        state = engine.load(found.path)
        step, consumed = restore(state, config)
        say(f"resumed from {found.path} at step {step} ({consumed} samples consumed)")
    peak = job_peak(config.precision.dtype, config.precision.torch_dtype, torch.device(device))
    resumed = step if found.path is not None else None
    journal = _open_journal(folder, config, spec, step)
    if journal is not None:
        journal.write(run_record(config, spec, device, peak, resumed))
    reader = StepReader(
        data.training,
        config.batch,
        config.parallel.dp,
        config.parallel.dp_rank(rank),
        spec.vocab,
        config.data.workers,
        read_step,
    )
    saver = Saver(config, spec, engine, folder.checkpoints, journal, found.path)
    profile = ProfileWindow(config.profile, folder.root, rank)
    rates = throughput(config, spec, peak)
    run = _Run(config, spec, device, engine, data, reader, saver, journal, watchdog, profile, rates)
    watchdog.start()
    try:
        return run.steps(step, consumed, request)
    except RuntimeError as error:
        raise worker_died(error) from error
    finally:
        watchdog.stop()
        reader.close()
        profile.close()
        if journal is not None:
            journal.close()


def _open_journal(folder: RunFolder, config: Config, spec: ArchSpec, step: int) -> Journal | None:
    """On rank 0, where the records are written; the others hear of what is wrong."""
    opened: list[Journal] = []

    def open_sinks() -> None:
        prepare_folder(folder, config, spec)
        sinks: list[Sink] = [MetricsFile(folder.metrics)]
        if config.logging.tensorboard:
            sinks.append(TensorBoardSink(folder, step + 1))
        if config.logging.wandb_project:
            sinks.append(WandbSink(folder, config.logging, to_table(config)))
        opened.append(Journal(sinks))

    on_rank_0(open_sinks)
    return opened[0] if opened else None


@dataclass
class _Run:
    config: Config
    spec: ArchSpec
    device: str
    engine: Engine
    data: Data
    reader: StepReader
    saver: Saver
    journal: Journal | None
    watchdog: Watchdog
    profile: ProfileWindow
    rates: Throughput
    _rewinds: int = field(default=0, init=False)
    _skips: int = field(default=0, init=False)  # in a row

    def steps(self, step: int, consumed: int, request: StopRequest) -> Ending:
        config, watch = self.config, SpikeWatch(self.config.spikes)
        total, times = (
            planned_steps(config.schedule, config.batch),
            RankTimes(torch.device(self.device)),
        )
        while not self._finished(step, consumed):
            start = time.perf_counter()
            self.watchdog.note("the step before", step + 1)
            self.profile.before(step + 1)
            batches = self.reader.read(consumed)
            data_s = time.perf_counter() - start
            self.watchdog.note("reading data")
            size = config.batch.size_at(consumed)
            step, consumed = step + 1, consumed + size
            position = config.schedule.position(step, consumed, config.batch.seq_len)
            lr = learning_rate(config.schedule, config.optim.lr, position)
            wrong, judge = self._judge(watch)
            outcome = self.engine.train_step(batches, lr, stop=request.asked(), judge=judge)
            seconds = time.perf_counter() - start
            phase_s = {"data": data_s, **outcome.phase_s}
            self._record(step, total, size, consumed, lr, outcome, seconds, phase_s)
            times.add(phase_s)
            self._exchange_times(step, times)
            self._publish_saved()
            if wrong:
                back = self._answer(step, consumed, wrong[0])
                if back is not None:
                    step = back
                    watch.forget()
                    continue
            elif outcome.updated:
                self._skips = 0
            last = outcome.stop or self._finished(step, consumed)
            self._evaluate(step, last=last and not outcome.stop)
            if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
                self.watchdog.note("the step's update", limit_s=config.run.save_timeout_s)
                self.saver.save(step, self._state(step, consumed), wait=last)
            if outcome.stop:
                return Ending(step, True, self.saver.newest)
        return Ending(step, False, self.saver.newest)

    def _publish_saved(self) -> None:
        """What ended in the background appears, and old checkpoints go: slow storage is no hang."""
        self.watchdog.note("the step's update", limit_s=self.config.run.save_timeout_s)
        self.saver.poll()
        self.watchdog.note("the step's update")

    def _finished(self, step: int, consumed: int) -> bool:
        schedule = self.config.schedule
        return schedule.position(step, consumed, self.config.batch.seq_len) >= schedule.length

    def _judge(
        self, watch: SpikeWatch
    ) -> tuple[list[str], Callable[[float, float, float | None], bool]]:
        """A judge for one step, and the list that it leaves its objection in."""
        wrong: list[str] = []
        smallest = self.config.precision.min_loss_scale

        def judge(loss: float, grad_norm: float, loss_scale: float | None) -> bool:
            overflow = loss_scale is not None and loss_scale > smallest
            found = watch.verdict(loss, grad_norm, overflow=overflow)
            if found is not None:
                wrong.append(found)
            return found is None

        return wrong, judge

    def _answer(self, step: int, consumed: int, wrong: str) -> int | None:
        """What ``spikes.policy`` says about a step that must not count. Returns the step gone back
        to, or None when the run goes on from here without the step's update. Loss and norm are the
        same on every rank, so all do the same; nothing of the bad step is saved."""
        message, policy = f"step {step}: {wrong}", self.config.spikes
        if policy.policy == "skip" and self._skips < policy.max_skips:
            self._skips += 1
            self._note_down({"kind": "skip", "step": step, "reason": wrong})
            say(f"{message}: the update is left out")
            return None
        self.watchdog.note("the step's update", limit_s=self.config.run.save_timeout_s)
        self.saver.finish()
        found = self.saver.newest
        self._rewinds += policy.policy == "rewind"
        if policy.policy != "rewind" or found is None or self._rewinds > policy.max_rewinds:
            raise _diverged(message, self._rewinds, self._skips, found)
        state = self.engine.load(found)
        back, before = int(state["step"]), int(state["consumed_samples"])
        skipped = {"skipped_samples": consumed - before, "reason": wrong}
        self._note_down({"kind": "rewind", "step": step, "to_step": back, **skipped})
        say(f"{message}: back to step {back}, past {consumed - before} samples")
        return back

    def _evaluate(self, step: int, *, last: bool) -> None:
        source, config = self.data.validation, self.config
        if source is None or not config.eval.due(step, last=last):
            return
        start = time.perf_counter()
        replica = config.parallel.dp_rank(dist.get_rank())
        batches = validation_batches(
            source, config.eval.samples, config.batch, config.parallel.dp, replica, self.spec.vocab
        )
        sums = []
        for batch in batches:
            sums.append(self.engine.evaluate([batch]))
            self.watchdog.note("a batch of validation")
        loss, seconds = mean_loss(sums), time.perf_counter() - start
        tokens = sum(weight for _, weight in sums)
        self._note_down(
            {"kind": "eval", "step": step, "loss": loss, "tokens": tokens, "seconds": seconds}
        )
        say(f"step {step} | validation loss {loss:.4f} | {tokens:,.0f} tokens in {seconds:.1f} s")

    def _exchange_times(self, step: int, times: RankTimes) -> None:
        every = self.config.logging.ranks_every
        if every and step % every == 0:
            self._note_down({"kind": "ranks", "step": step, **times.exchange()})

    def _note_down(self, record: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.write(record)

    def _record(
        self,
        step: int,
        total: int,
        size: int,
        consumed: int,
        lr: float,
        outcome: StepOutcome,
        seconds: float,
        phase_s: dict[str, float],
    ) -> None:
        if self.journal is None:
            return
        tokens = size * self.config.batch.seq_len
        record = StepRecord(
            step=step,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=lr,
            tokens=tokens,
            consumed_tokens=consumed * self.config.batch.seq_len,
            consumed_samples=consumed,
            step_time_s=seconds,
            **self.rates.rates(tokens, seconds),
            peak_mem_gib=peak_memory_gib(self.device),
            phase_s=phase_s,
            updated=outcome.updated,
            loss_scale=outcome.loss_scale,
        )
        self.journal.write(step_values(record))
        say(step_line(record, total))

    def _state(self, step: int, consumed: int) -> dict[str, Any]:
        return {
            "schema": STATE_SCHEMA,
            "step": step,
            "consumed_samples": consumed,
            "data_seed": self.config.data.seed,
            "config": to_table(self.config),
        }


def _diverged(message: str, rewinds: int, skips: int, found: Path | None) -> Exception:
    """What ends the run: rank 0 says it, the others follow."""
    if dist.get_rank() != 0:
        return PeerError(message)
    hint = "the last checkpoint is intact: lower optim.lr or clip harder, then run again"
    if rewinds and found is None:
        message += "; there is no checkpoint to go back to"
    elif rewinds:
        message += f"; went back {rewinds - 1} times already"
    elif skips:
        message += f"; left out {skips} updates in a row already"
    else:
        hint += '; or set spikes.policy="skip" or "rewind"'
    return UserError(
        f"{message}: training has diverged, the weights of this step were not saved", hint=hint
    )
