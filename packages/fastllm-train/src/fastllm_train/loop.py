"""The training loop on one rank: data in, steps, records, checkpoints, an orderly end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastllm_planner.arch import ArchSpec, to_hf_config
from fastllm_train import checkpoint, portable
from fastllm_train.config import Config, to_table
from fastllm_train.coordination import on_rank_0, say
from fastllm_train.data import SampleSource, open_training_data, read_step
from fastllm_train.engine import Engine, StepOutcome
from fastllm_train.engine_deepspeed import DeepSpeedEngine
from fastllm_train.errors import PeerError, UserError
from fastllm_train.metrics import (
    MetricsFile,
    StepRecord,
    Throughput,
    peak_memory_gib,
    run_record,
    step_line,
    throughput,
)
from fastllm_train.peak import job_peak
from fastllm_train.pretrained import PretrainedWeights
from fastllm_train.run_folder import RunFolder, lock, write_atomically, write_config
from fastllm_train.saver import Saver, deepspeed_layout
from fastllm_train.schedule import learning_rate
from fastllm_train.spikes import SpikeWatch

STATE_SCHEMA = 1


@dataclass(frozen=True)
class Ending:
    """How a run ended: its last step, and whether a signal asked for it."""

    step: int
    stopped: bool
    checkpoint: Path | None


class StopRequest:
    """SIGTERM or SIGINT arrived, or our launcher died (a rank that trained on alone would fight the
    next run over the folder). The loop looks between steps, and all ranks stop together."""

    def __init__(self, launcher_pid: int | None = None) -> None:
        self.signal: int | None = None
        self._launcher_pid = launcher_pid

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def asked(self) -> bool:
        orphaned = self._launcher_pid is not None and os.getppid() != self._launcher_pid
        return self.signal is not None or orphaned

    def _handle(self, number: int, frame: object) -> None:
        del frame
        if self.signal is not None:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.signal = number


def train(
    config: Config, spec: ArchSpec, device: str, request: StopRequest, *, fresh: bool = False
) -> Ending:
    """Train from the newest checkpoint under ``run.out``, or from scratch, to ``schedule.steps``.

    ``fresh`` deletes the run's checkpoints and metrics first.
    """
    folder = RunFolder(Path(config.run.out))
    on_rank_0(lambda: lock(folder))
    source = _open_data_in_turn(config, spec)
    if fresh:
        on_rank_0(lambda: _start_again(folder))
    found = _agree_on_checkpoint(folder)
    torch.manual_seed(config.run.seed)
    start, weights = _start_of(found.path, config, spec), None
    if found.path is None and config.model.weights:
        weights = _pretrained(Path(config.model.weights), spec).weight
        say(f"weights from {config.model.weights}")
    engine: Engine = DeepSpeedEngine(config, spec, device, start, weights)
    step, consumed = 0, 0
    if found.path is not None:
        state = engine.load(found.path)
        step, consumed = _restore(state, config)
        say(f"resumed from {found.path} at step {step} ({consumed} samples consumed)")
    peak = job_peak(config.precision.dtype, config.precision.torch_dtype, torch.device(device))
    metrics: MetricsFile | None = None
    if dist.get_rank() == 0:
        _prepare_folder(folder, config, spec)
        metrics = MetricsFile(folder.metrics)
        resumed = step if found.path is not None else None
        metrics.write(run_record(config, spec, device, peak, resumed))
    try:
        saver = Saver(config, spec, engine, folder.checkpoints, metrics, found.path)
        run = _Run(config, spec, device, engine, source, saver, metrics)
        return run.steps(step, consumed, throughput(config, spec, peak), request)
    finally:
        if metrics is not None:
            metrics.close()


@dataclass(frozen=True)
class _Run:
    config: Config
    spec: ArchSpec
    device: str
    engine: Engine
    source: SampleSource
    saver: Saver
    metrics: MetricsFile | None

    def steps(self, step: int, consumed: int, rates: Throughput, request: StopRequest) -> Ending:
        config, total = self.config, self.config.schedule.steps
        watch, rewinds = SpikeWatch(config.spikes), 0
        while step < total:
            start = time.perf_counter()
            batches = read_step(
                self.source,
                consumed,
                config.batch,
                config.parallel.dp,
                config.parallel.dp_rank(dist.get_rank()),
                self.spec.vocab,
            )
            data_s = time.perf_counter() - start
            step += 1
            lr = learning_rate(config.schedule, config.optim.lr, step)
            outcome = self.engine.train_step(batches, lr, stop=request.asked())
            consumed += config.batch.global_size
            seconds = time.perf_counter() - start
            phases = {"data": data_s, **outcome.phase_s}
            self._record(step, consumed, lr, outcome, seconds, phases, rates)
            self.saver.poll()
            wrong = watch.verdict(outcome.loss, outcome.grad_norm)
            if wrong is not None:
                rewinds += 1
                step = self._rewind(step, consumed, wrong, rewinds)
                watch.forget()
                continue
            every = config.checkpoint.every
            last = outcome.stop or step == total
            if last or (every and step % every == 0):
                self.saver.save(step, self._state(step, consumed), wait=last)
            if outcome.stop:
                return Ending(step, True, self.saver.newest)
        return Ending(step, False, self.saver.newest)

    def _rewind(self, step: int, consumed: int, wrong: str, rewinds: int) -> int:
        """Back to the last checkpoint; its step. The samples since then, up to ``consumed``, are
        not read again: the order is a function of their number. Loss and norm are the same on every
        rank, so all ranks do the same; nothing of the bad step is saved."""
        message, policy = f"step {step}: {wrong}", self.config.spikes
        found = self.saver.newest
        if policy.policy == "stop" or found is None or rewinds > policy.max_rewinds:
            raise _diverged(message, rewinds if policy.policy == "rewind" else 0, found)
        state = self.engine.load(found)
        back, before = int(state["step"]), int(state["consumed_samples"])
        if self.metrics is not None:
            skipped = {"skipped_samples": consumed - before, "reason": wrong}
            self.metrics.write({"kind": "rewind", "step": step, "to_step": back, **skipped})
        say(f"{message}: back to step {back}, past {consumed - before} samples")
        return back

    def _record(
        self,
        step: int,
        consumed: int,
        lr: float,
        outcome: StepOutcome,
        seconds: float,
        phase_s: dict[str, float],
        rates: Throughput,
    ) -> None:
        if self.metrics is None:
            return
        batch = self.config.batch
        tokens = batch.global_size * batch.seq_len
        record = StepRecord(
            step=step,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=lr,
            tokens=tokens,
            consumed_tokens=consumed * batch.seq_len,
            consumed_samples=consumed,
            step_time_s=seconds,
            **rates.rates(tokens, seconds),
            peak_mem_gib=peak_memory_gib(self.device),
            phase_s=phase_s,
        )
        self.metrics.step(record)
        say(step_line(record, self.config.schedule.steps))

    def _state(self, step: int, consumed: int) -> dict[str, Any]:
        return {
            "schema": STATE_SCHEMA,
            "step": step,
            "consumed_samples": consumed,
            "data_seed": self.config.data.seed,
            "config": to_table(self.config),
        }


def _start_of(
    path: Path | None, config: Config, spec: ArchSpec
) -> portable.PortableCheckpoint | None:
    """The checkpoint an engine takes its weights from, if it is portable."""
    if path is None:
        return None
    if not portable.is_portable(path):
        on_rank_0(lambda: _refuse_other_layout(path, config))
        return None
    on_rank_0(lambda: portable.PortableCheckpoint(path, spec))  # says once what is wrong
    return portable.PortableCheckpoint(path, spec)


def _pretrained(folder: Path, spec: ArchSpec) -> PretrainedWeights:
    on_rank_0(lambda: PretrainedWeights(folder, spec))  # says once what is wrong
    return PretrainedWeights(folder, spec)


def _refuse_other_layout(path: Path, config: Config) -> None:
    saved, wanted = checkpoint.layout_of(path), deepspeed_layout(config)
    if saved is not None and saved != wanted:
        changed = [f"{k} {saved.get(k)} → {v}" for k, v in wanted.items() if saved.get(k) != v]
        names = ", ".join(changed)
        raise UserError(
            f"{path} was written in another layout ({names}); DeepSpeed resumes only the same one",
            hint='write with checkpoint.format="portable" to change the layout, or use --fresh',
        )


def _diverged(message: str, rewinds: int, found: Path | None) -> Exception:
    """What ends the run: rank 0 says it, the others follow."""
    if dist.get_rank() != 0:
        return PeerError(message)
    hint = "the last checkpoint is intact: lower optim.lr or clip harder, then run again"
    if rewinds and found is None:
        message += "; there is no checkpoint to go back to"
    elif rewinds:
        message += f"; went back {rewinds - 1} times already"
    else:
        hint += '; or set spikes.policy="rewind"'
    return UserError(
        f"{message}: training has diverged, the weights of this step were not saved", hint=hint
    )


def _open_data_in_turn(config: Config, spec: ArchSpec) -> SampleSource:
    """Rank 0 first: what is wrong with the files is then said once."""
    opened: list[SampleSource] = []

    def open_once() -> None:
        opened.append(
            open_training_data(
                config.data, config.batch, steps=config.schedule.steps, vocab=spec.vocab
            )
        )

    on_rank_0(open_once)
    if not opened:
        open_once()
    return opened[0]


def _start_again(folder: RunFolder) -> None:
    checkpoint.clear(folder.checkpoints)
    folder.metrics.unlink(missing_ok=True)


def _agree_on_checkpoint(folder: RunFolder) -> checkpoint.Found:
    """Rank 0 looks, all ranks use what it found."""
    answer: list[checkpoint.Found | None] = [None]
    if dist.get_rank() == 0:
        answer = [checkpoint.newest(folder.checkpoints)]
    dist.broadcast_object_list(answer, src=0)
    found = answer[0]
    assert found is not None
    for fault in found.rejected:
        say(f"warning: skipped a damaged checkpoint: {fault}")
    return found


def _restore(state: dict[str, Any], config: Config) -> tuple[int, int]:
    if state.get("schema") != STATE_SCHEMA:
        raise UserError(f"the checkpoint's state has schema {state.get('schema')!r}")
    if state["data_seed"] != config.data.seed:
        raise UserError(
            f"the checkpoint was trained with data.seed={state['data_seed']}, the config says "
            f"{config.data.seed}: the data order would change",
            hint=f"set data.seed={state['data_seed']}, or start again with --fresh",
        )
    return int(state["step"]), int(state["consumed_samples"])


def _prepare_folder(folder: RunFolder, config: Config, spec: ArchSpec) -> None:
    import json

    write_config(folder, to_table(config))
    hf_config = to_hf_config(spec, dtype=config.precision.hf_name)
    text = json.dumps(hf_config, indent=2) + "\n"
    write_atomically(folder.checkpoints / "config.json", text)
    if config.data.tokenizer:
        tokenizer = Path(config.data.tokenizer)
        target = folder.checkpoints / f"tokenizer{tokenizer.suffix}"
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(tokenizer, temporary)
        temporary.replace(target)
