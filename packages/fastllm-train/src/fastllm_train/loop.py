"""The training loop on one rank: data in, steps, records, checkpoints, an orderly end."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastllm_planner.arch import ArchSpec, count_params, to_hf_config
from fastllm_train import checkpoint, portable
from fastllm_train.config import Config, to_table
from fastllm_train.data import SampleSource, open_training_data, read_step
from fastllm_train.deepspeed_config import effective_zero_stage
from fastllm_train.deepspeed_states import MOMENTS
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
from fastllm_train.run_folder import RunFolder, lock, write_atomically, write_config
from fastllm_train.schedule import learning_rate

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
    engine: Engine = DeepSpeedEngine(config, spec, device, _start_of(found.path, config, spec))
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
        run = _Run(config, spec, device, engine, source, folder, metrics)
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
    folder: RunFolder
    metrics: MetricsFile | None

    def steps(self, step: int, consumed: int, rates: Throughput, request: StopRequest) -> Ending:
        config, total = self.config, self.config.schedule.steps
        saved: Path | None = None
        saved_at = step
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
            self._record(
                step,
                consumed,
                lr,
                outcome.loss,
                outcome.grad_norm,
                seconds,
                {"data": data_s, **outcome.phase_s},
                rates,
            )
            _stop_at_nonsense(step, outcome)
            every = config.checkpoint.every
            if outcome.stop or step == total or (every and step % every == 0):
                saved, saved_at = self._save(step, consumed), step
            if outcome.stop:
                return Ending(step, True, saved)
        assert saved_at == step
        return Ending(step, False, saved)

    def _record(
        self,
        step: int,
        consumed: int,
        lr: float,
        loss: float,
        grad_norm: float,
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
            loss=loss,
            grad_norm=grad_norm,
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

    def _save(self, step: int, consumed: int) -> Path:
        """Write and publish a checkpoint; on return every rank knows that it is durable."""
        start = time.perf_counter()
        root, tag = self.folder.checkpoints, checkpoint.tag_of(step)
        needed = checkpoint_bytes(self.config, self.spec)
        on_rank_0(lambda: checkpoint.require_space(checkpoint.saving_folder(root), needed))
        self.engine.save(root / checkpoint.SAVING / tag, self._state(step, consumed))
        dist.barrier()
        bound = (
            checkpoint.written_format(self.config.checkpoint, self.config.parallel) == "deepspeed"
        )
        layout = deepspeed_layout(self.config) if bound else None
        on_rank_0(lambda: checkpoint.publish(root, tag, layout))
        on_rank_0(lambda: checkpoint.prune(root, self.config.checkpoint.keep_last))
        seconds = time.perf_counter() - start
        if self.metrics is not None:
            self.metrics.write({"kind": "checkpoint", "step": step, "seconds": seconds})
        say(f"checkpoint {root / tag} ({seconds:.1f} s)")
        return root / tag

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


def checkpoint_bytes(config: Config, spec: ArchSpec) -> int:
    """Size of a checkpoint, a little rounded up: fp32 master and moments, the model's own copy."""
    copies = 1 + len(MOMENTS[config.optim.name])
    portable_only = checkpoint.written_format(config.checkpoint, config.parallel) == "portable"
    own = 0 if portable_only else config.precision.torch_dtype.itemsize
    return int(1.02 * count_params(spec) * (4 * copies + own)) + 2**20


def deepspeed_layout(config: Config) -> dict[str, object]:
    """What DeepSpeed's own checkpoints are bound to."""
    parallel, stage = config.parallel, effective_zero_stage(config)[0]
    sizes = {name: getattr(parallel, name) for name in ("dp", "tp", "pp", "cp")}
    sizes["zero_stage"] = stage
    return {**sizes, "dtype": config.precision.dtype}


def _refuse_other_layout(path: Path, config: Config) -> None:
    saved, wanted = checkpoint.layout_of(path), deepspeed_layout(config)
    if saved is not None and saved != wanted:
        changed = [f"{k} {saved.get(k)} → {v}" for k, v in wanted.items() if saved.get(k) != v]
        names = ", ".join(changed)
        raise UserError(
            f"{path} was written in another layout ({names}); DeepSpeed resumes only the same one",
            hint='write with checkpoint.format="portable" to change the layout, or use --fresh',
        )


def _stop_at_nonsense(step: int, outcome: StepOutcome) -> None:
    """Loss and norm are the same on every rank, so all ranks stop, and none saves."""
    if math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm):
        return
    message = f"step {step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}"
    if dist.get_rank() != 0:
        raise PeerError(message)
    raise UserError(
        f"{message}: training has diverged, the weights of this step were not saved",
        hint="the last checkpoint is intact: lower optim.lr or clip harder, then run again",
    )


def on_rank_0(action: Callable[[], object]) -> None:
    """Run on rank 0 while the others wait; a failure there is an error on every rank."""
    failed: list[str | None] = [None]
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, UserError) as error:
            failed = [str(error)]
            failure = error
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        if dist.get_rank() == 0:
            raise UserError(failed[0], hint=getattr(failure, "hint", "")) from failure
        raise PeerError(failed[0])


def say(text: str) -> None:
    """One line of the log: stderr, rank 0 only."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


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
