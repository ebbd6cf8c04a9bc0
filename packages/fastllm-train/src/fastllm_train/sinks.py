"""Where a run's records go ([logging]): metrics.jsonl always, TensorBoard and W&B when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastllm_train.errors import UserError
from fastllm_train.run_folder import RunFolder

# What a step's record shows as curves.
CURVES = (
    "loss",
    "grad_norm",
    "lr",
    "loss_scale",
    "tokens",
    "step_time_s",
    "tokens_per_s",
    "model_tflops_full",
    "mfu_full_pct",
    "peak_mem_gib",
)


@dataclass(frozen=True)
class LoggingConfig:
    """``tensorboard`` writes event files under OUT/tensorboard. ``wandb_project`` logs to Weights &
    Biases as run ``wandb_name`` (``WANDB_MODE=offline`` works). Every ``ranks_every`` steps (0:
    never) all ranks' times by phase are recorded."""

    tensorboard: bool = False
    wandb_project: str = ""
    wandb_name: str = ""
    ranks_every: int = 50

    def __post_init__(self) -> None:
        if self.ranks_every < 0:
            raise UserError(f"logging.ranks_every={self.ranks_every} is negative")


class Sink(Protocol):
    """Takes records as metrics.jsonl holds them."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Journal:
    """Every record to every sink. Lives on rank 0."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, record: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's curves: name → value; empty for kinds that have none."""
    if record["kind"] == "step":
        found = {f"train/{key}": record[key] for key in CURVES if record.get(key) is not None}
        return {**found, **{f"time/{k}": v for k, v in record["phase_s"].items()}}
    if record["kind"] == "eval":
        return {"validation/loss": record["loss"]}
    return {}


class TensorBoardSink:
    """Event files for ``tensorboard --logdir OUT/tensorboard``. ``first_step``: what files of an
    earlier start hold from there on is not shown."""

    def __init__(self, folder: RunFolder, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard=true, but tensorboard is not installed",
                hint="pip install 'fastllm-train[tensorboard]'",
            ) from error
        self._writer = SummaryWriter(str(folder.root / "tensorboard"), purge_step=first_step)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One W&B run per folder: a restart goes on with it."""

    def __init__(self, folder: RunFolder, config: LoggingConfig, table: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UserError(
                "logging.wandb_project is set, but wandb is not installed",
                hint="pip install 'fastllm-train[wandb]'",
            ) from error
        known = folder.root / "wandb-run"
        run_id = known.read_text(encoding="utf-8").strip() if known.exists() else None
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or None,
            dir=str(folder.root),
            config=dict(table),
            id=run_id,
            resume="allow",
        )
        known.write_text(f"{self._run.id}\n", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        found = scalars(record)
        if found:
            self._run.log({**found, "step": record["step"]})

    def close(self) -> None:
        self._run.finish()
