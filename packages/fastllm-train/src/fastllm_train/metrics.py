"""What a run reports while it trains: metrics.jsonl and one line per step."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from fastllm_planner.arch import ArchSpec, count_params, spec_to_dict
from fastllm_planner.flops import hardware_flops_per_token, model_flops_per_token
from fastllm_train.config import Config, to_table
from fastllm_train.peak import Peak

SCHEMA = 1
GIB = 2**30


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl. TFLOPs are per device; ``phase_s`` is rank 0's time by phase;
    ``updated`` is false when the step's update was left out; ``loss_scale`` is fp16's."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    consumed_tokens: int
    consumed_samples: int
    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    model_tflops_full: float
    model_tflops_causal: float
    hardware_tflops: float
    mfu_full_pct: float
    peak_mem_gib: float
    phase_s: Mapping[str, float]
    updated: bool = True
    loss_scale: float | None = None


@dataclass(frozen=True)
class Throughput:
    """Turns a step's time into rates. FLOPs per token by convention: ``fastllm_planner.flops``."""

    flops_full: float
    flops_causal: float
    flops_hardware: float
    devices: int
    peak: Peak

    def rates(self, tokens: int, seconds: float) -> dict[str, float]:
        """tokens: of the global batch; seconds: wall time of the step."""
        per_device = tokens / seconds / self.devices
        full = per_device * self.flops_full / 1e12
        return {
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_per_device": per_device,
            "model_tflops_full": full,
            "model_tflops_causal": per_device * self.flops_causal / 1e12,
            "hardware_tflops": per_device * self.flops_hardware / 1e12,
            "mfu_full_pct": 100.0 * full / self.peak.tflops,
        }


def throughput(config: Config, spec: ArchSpec, peak: Peak) -> Throughput:
    seq_len = config.batch.seq_len
    return Throughput(
        flops_full=model_flops_per_token(spec, seq_len, "full"),
        flops_causal=model_flops_per_token(spec, seq_len, "causal"),
        flops_hardware=hardware_flops_per_token(spec, seq_len, config.parallel.recompute),
        devices=config.parallel.world_size,
        peak=peak,
    )


def run_record(
    config: Config, spec: ArchSpec, device: str, peak: Peak, resumed_from: int | None
) -> dict[str, Any]:
    """The line that starts every (re)start."""
    table = to_table(config)
    return {
        "kind": "run",
        "schema": SCHEMA,
        "arch": spec_to_dict(spec),
        "parallel": table["parallel"],
        "batch": table["batch"],
        "dtype": config.precision.dtype,
        "params": count_params(spec),
        "device": device,
        "devices": config.parallel.world_size,
        "peak_tflops": peak.tflops,
        "peak_source": peak.source,
        "resumed_from": resumed_from,
    }


class MetricsFile:
    """Appends JSON lines, each flushed, so a killed run loses no finished step."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # the last run was killed in the middle of a line

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def step_values(record: StepRecord) -> dict[str, Any]:
    """The record as metrics.jsonl holds it; no loss scale where there is none."""
    values = {"kind": "step", **asdict(record)}
    if record.loss_scale is None:
        del values["loss_scale"]
    return values


def step_line(record: StepRecord, steps: int) -> str:
    width = len(str(steps))
    scale = "" if record.loss_scale is None else f" | loss scale {record.loss_scale:.0f}"
    left_out = "" if record.updated else " | update left out"
    return (
        f"step {record.step:>{width}}/{steps}"
        f" | loss {record.loss:.4f} | grad norm {record.grad_norm:.3f} | lr {record.lr:.2e}"
        f" | {record.tokens_per_s:,.0f} tokens/s | {record.step_time_s:.2f} s"
        f" | {record.model_tflops_full:.3f} TFLOPs/device (model, full)"
        f" | MFU {record.mfu_full_pct:.1f}% | {record.peak_mem_gib:.2f} GiB"
        f"{scale}{left_out}"
    )


def peak_memory_gib(device: str) -> float:
    """Most memory held so far: the allocator's on CUDA, the process's resident set on CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
