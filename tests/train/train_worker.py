"""One rank of a test job: runs several configs one after another and saves their trajectories.

Started by ``run_layouts`` with torch.distributed's environment: CONFIGS.json OUT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from layout_worker import left_out_of
from planted import left_out, left_out_once, replaced
from rank_job import Job, run_jobs
from safetensors.torch import load_file
from train_layouts import Trajectory, samples_of

from fastllm_train import gradient_sums
from fastllm_train.config import Config, build_config, to_table
from fastllm_train.data import read_step
from fastllm_train.engine_choice import build_engine
from fastllm_train.master_weights import MasterWeights
from fastllm_train.portable import PortableCheckpoint, is_portable
from fastllm_train.schedule import learning_rate
from fastllm_train.sharded_weights import ShardedWeights
from fastllm_train.tensor_parallel.apply import copies_differ


def run_layouts(configs: dict[str, Config], folder: Path) -> dict[str, Trajectory]:
    """Run every config, in one job of real processes over gloo for each world size."""
    by_size: dict[int, dict[str, Any]] = {}
    for name, config in configs.items():
        by_size.setdefault(config.parallel.world_size, {})[name] = to_table(config)
    jobs: list[Job] = []
    for size, tables in by_size.items():
        listing = folder / f"configs{size}.json"
        listing.write_text(json.dumps(tables))
        jobs.append((size, [__file__, str(listing), str(folder)]))
    run_jobs(jobs)
    return {name: _read(folder / f"{name}.pt") for name in configs}


def _read(path: Path) -> Trajectory:
    raw: dict[str, Any] = torch.load(path, weights_only=True)
    return Trajectory(**raw)


SAVE_AT = 3


def all_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a portable checkpoint, by name."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(file)
    return found


def mean_of_means(tensors: Any, engine: Any, batch: Any) -> list[torch.Tensor]:
    """Every micro-batch counts the same, however many tokens it learns."""
    *rest, mask = tensors(engine, batch)
    return [*rest, mask / mask.sum().clamp(min=1)]


class Done:
    """A collective that was never begun."""

    def wait(self) -> None:
        pass


def weights_of_the_model(restore: Any, states: Any, param: Any, weight: Any, moments: Any) -> None:
    """The master is what the model's bf16 weight says."""
    restore(states, param, weight.bfloat16(), moments)


def saved_again(config: Config, name: str) -> Path:
    """Where a run that starts from a portable checkpoint saves before its first step."""
    return Path(config.run.out) / name / f"global_step{SAVE_AT}"


@contextmanager
def planted(name: str) -> Iterator[None]:
    """What a run's name says is done wrong in it."""
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    import fastllm_train.engine_deepspeed as module
    from fastllm_train import deepspeed_config, engine_torch
    from fastllm_train.engine_torch import TorchEngine
    from fastllm_train.gradient_sums import GradientSums
    from fastllm_train.master_weights import MasterWeights
    from fastllm_train.sharded_weights import Shard
    from fastllm_train.tensor_parallel import apply, layers

    engine, states = module.DeepSpeedEngine, module.EngineStates
    steps_from_zero = lambda begin, self, _: begin(self, 0)  # noqa: E731
    zero_0_in_bf16: list[tuple[Any, str, Callable[..., Any]]] = [
        (m, "effective_zero_stage", lambda _, config: (config.parallel.zero_stage, ""))
        for m in (module, deepspeed_config)
    ]
    wrong: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
        "unmarked": [(module, "mark_counted", lambda *_: None)],
        "mean of means": [(engine, "_tensors", mean_of_means)],
        "no sum": [(apply, "sum_over_ranks", left_out_once())],
        "no norm sum": [(layers, "sum_gradient", left_out)],
        "one bucket left": [(GradientSums, "_reduce", left_out_of(1))],
        "torch mean of means": [(TorchEngine, "_tensors", mean_of_means)],
        "all copies counted": [(engine_torch, "counts_here", lambda *_: True)],
        "shares not gathered": [(Shard, "gather", lambda *_: Done())],
        "whole sums counted": [(GradientSums, "share_of", lambda _, sums, p: sums.of(p))],
        "scattered": [(gradient_sums, "scatters", lambda *_: True)],  # not wrong: as on NCCL
        "no master": [(MasterWeights, "restore", weights_of_the_model)],
        "no adam step": [(states, "begin_restore", steps_from_zero)],
        "zero0 as it is": zero_0_in_bf16,
        "zero0 without its step": [
            *zero_0_in_bf16,
            (FP16_UnfusedOptimizer, "initialize_optimizer_states", lambda *_: None),
        ],
    }
    with ExitStack() as stack:
        for owner, attribute, function in wrong.get(name.split(":")[0], []):
            stack.enter_context(replaced(owner, attribute, function))
        yield


def _run(name: str, config: Config) -> dict[str, Any]:
    """All steps. "save…" writes a checkpoint into run.out after SAVE_AT steps; "load…" starts from
    that one, "again" goes back to it before the last step; a plant's name before a colon does that
    wrong."""
    spec = config.model.resolve()
    source = samples_of(config, spec)
    folder = Path(config.run.out) / f"global_step{SAVE_AT}"
    action = name.split(":")[-1].strip()
    loading = action.startswith("load")
    start = PortableCheckpoint(folder, spec) if loading and is_portable(folder) else None
    engine: Any = build_engine(config, spec, "cpu", start)
    first = 1
    steps_before = _adam_steps(engine)
    if loading:
        state = engine.load(folder)
        first = state["step"] + 1
        assert state["consumed_samples"] == SAVE_AT * config.batch.global_size
        if start is not None:  # what has been loaded, gathered again
            engine.save(saved_again(config, name), {"step": SAVE_AT, "consumed_samples": 0})
    losses: list[float] = []
    norms: list[float] = []
    steps = list(range(first, config.schedule.steps + 1))
    if action == "again":
        steps[-1:] = steps[SAVE_AT:]
    for step in steps:
        if action == "again" and len(losses) == SAVE_AT + 1:
            engine.load(folder)
        consumed = (step - 1) * config.batch.global_size
        dp_rank = config.parallel.dp_rank(torch.distributed.get_rank())
        batches = read_step(source, consumed, config.batch, config.parallel.dp, dp_rank, spec.vocab)
        lr = learning_rate(config.schedule, config.optim.lr, step)
        outcome = engine.train_step(batches, lr, stop=False)
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
        if action.startswith("save") and step == SAVE_AT:
            done = consumed + config.batch.global_size
            engine.save(folder, {"step": step, "consumed_samples": done})
            torch.distributed.barrier()
    weights = dict(engine.master_parameters())
    unequal = _copies_that_differ(engine)
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "unequal": unequal,
        "steps_before": steps_before,
    }


def _adam_steps(engine: Any) -> int:
    """By the optimizer's own count: none when a run starts."""
    if isinstance(engine._states, MasterWeights | ShardedWeights):
        return engine._states.steps if engine._loaded is None else 0  # those of the checkpoint
    states = engine._states._torch_optimizer.state.values()
    return max((int(state.get("step", 0)) for state in states), default=0)


def _copies_that_differ(engine: Any) -> int:
    """Tensors, summed over ranks, of which tensor-parallel ranks hold copies that are not equal to
    the bit: the model's own and the master's."""
    count = 0
    mesh: Any = engine._mesh
    if mesh.tp > 1:
        for param, named in engine._state.parameters():
            master = engine._states.weight(named)
            own = [] if getattr(named, "ds_shape", None) else [named.detach()]
            count += sum(copies_differ(engine._spec, mesh, param, x) for x in (master, *own))
    total = torch.tensor(count)
    torch.distributed.all_reduce(total)
    return int(total)


def main() -> None:
    from fastllm_train.distributed import join, place_from_env

    listing, folder = Path(sys.argv[1]), Path(sys.argv[2])
    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu")
    gradient_sums.BUCKET_BYTES = 32 * 1024  # several in a tiny model
    for name, table in json.loads(listing.read_text()).items():
        with planted(name):
            result = _run(name, build_config(table))
        if place.rank == 0:
            torch.save(result, folder / f"{name}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
