"""What is asked (``Job``) and what is answered (``Plan``): memory, time, days and cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from fastllm_planner.arch import ArchSpec, count_active_params, count_params
from fastllm_planner.backends import Backend
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import GIB, Cluster, Gpu
from fastllm_planner.layout import Layout, check_layout
from fastllm_planner.memory import MemoryEstimate, StageMemory, estimate_memory
from fastllm_planner.memory_parts import memory_parts
from fastllm_planner.profile import Profile
from fastllm_planner.steptime import StepEstimate, estimate_step

SCHEMA = 1
DEFAULT_SEQ_LEN = 4096
DEFAULT_BATCH_TOKENS = 4 * 2**20
# Long runs lose 10-18 % to restarts and stalls (Llama 3, arXiv:2407.21783 §3.3.4: 90 % effective).
DEFAULT_GOODPUT = 0.9
# Peaks within this share of the device are not recommended: the estimate is not that exact.
DEFAULT_HEADROOM = 0.05
# Host memory of a node where nobody said: twice its devices' (a DGX H100 has 2 TB for 640 GB).
DEFAULT_HOST_SHARE = 2
SECONDS_PER_DAY = 86_400.0


@dataclass(frozen=True)
class Job:
    """One question. Batch in sequences, ``tokens`` to train on (None: no days), ``price`` per
    device and hour, ``goodput`` and ``headroom`` as shares.
    """

    name: str
    spec: ArchSpec
    cluster: Cluster
    backend: Backend
    global_batch: int
    seq_len: int
    dtype: str = "bf16"
    flash: bool = True
    tokens: float | None = None
    price: float | None = None
    goodput: float = DEFAULT_GOODPUT
    headroom: float = DEFAULT_HEADROOM
    profile: Profile | None = None
    tp_across_nodes: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.goodput <= 1:
            raise UserError(f"goodput {self.goodput:g} is not a share between 0 and 1")
        if not 0 <= self.headroom < 1:
            raise UserError(f"headroom {self.headroom:g} is not a share between 0 and 1")
        if self.spec.position == "learned" and self.seq_len > self.spec.max_seq_len:
            raise UserError(
                f"--seq-len {self.seq_len} is longer than {self.name}'s "
                f"{self.spec.max_seq_len} learned positions"
            )

    @cached_property
    def usable_bytes(self) -> float:
        """Device memory that a recommended layout may fill."""
        return self.cluster.device.memory_bytes * (1.0 - self.headroom)

    @cached_property
    def params(self) -> int:
        return count_params(self.spec)

    def reasons_against(self, layout: Layout) -> list[str]:
        """Why the layout cannot run on this job's cluster and backend (memory apart)."""
        return check_layout(
            self.spec, layout, self.cluster, self.backend, tp_across_nodes=self.tp_across_nodes
        )


@dataclass(frozen=True)
class Plan:
    """A layout with everything that is predicted about it."""

    job: Job
    layout: Layout
    memory: MemoryEstimate
    step: StepEstimate

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.job.cluster)

    @property
    def tight(self) -> bool:
        """Fits, but inside the headroom that the planner leaves when it recommends."""
        return self.fits and self.memory.required > self.job.usable_bytes

    @property
    def days(self) -> float | None:
        """Calendar days for ``job.tokens``, goodput included."""
        return self._days(self.step.total)

    @property
    def days_range(self) -> tuple[float, float] | None:
        low, high = self._days(self.step.low), self._days(self.step.high)
        return None if low is None or high is None else (low, high)

    @property
    def gpu_hours(self) -> float | None:
        return None if self.days is None else self.days * 24 * self.job.cluster.n_gpus

    @property
    def cost(self) -> float | None:
        if self.gpu_hours is None or self.job.price is None:
            return None
        return self.gpu_hours * self.job.price

    def _days(self, step_seconds: float) -> float | None:
        if self.job.tokens is None:
            return None
        steps = self.job.tokens / self.step.tokens_per_step
        return steps * step_seconds / SECONDS_PER_DAY / self.job.goodput


def price_layout(job: Job, layout: Layout) -> Plan:
    """Memory and time of one layout of a job."""
    memory = estimate_memory(job.spec, layout, job.cluster, job.backend)
    step = estimate_step(job.spec, layout, job.cluster, job.backend, job.profile)
    return Plan(job, layout, memory, step)


def default_batch(seq_len: int, n_gpus: int) -> int:
    """About 4 Mi tokens in sequences: a multiple of the devices, or of a part of them that leaves
    the rest to model parallelism."""
    wanted = max(1, DEFAULT_BATCH_TOKENS // seq_len)
    replicas = max(d for d in range(1, min(wanted, n_gpus) + 1) if n_gpus % d == 0)
    if replicas * 8 < min(wanted, n_gpus):  # a prime number of devices: nothing else divides it
        replicas = n_gpus
    return max(1, round(wanted / replicas)) * replicas


def default_dtype(device: Gpu) -> str:
    """What one would train in: fp32 on a CPU, bf16 where there are units for it, else fp16."""
    if device.architecture == "cpu":
        return "fp32"
    return "bf16" if device.supports("bf16") else "fp16"


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """One plan as JSON values. Bytes, seconds, and TFLOP/s per device."""
    step = asdict(plan.step)
    return {
        "layout": layout_to_json(plan.layout),
        "fits": plan.fits,
        "tight": plan.tight,
        "required_bytes": plan.memory.required,
        "required_gib": plan.memory.required / GIB,
        "stages": [_stage_to_json(stage) for stage in plan.memory.stages],
        "host_bytes": plan.memory.host_bytes,
        "nvme_bytes": plan.memory.nvme_bytes,
        "step_seconds": step,
        "tokens_per_s_per_gpu": plan.step.tokens_per_s_per_gpu,
        "mfu_full_pct": 100 * plan.step.mfu("full"),
        "mfu_causal_pct": 100 * plan.step.mfu("causal"),
        "days": plan.days,
        "days_range": plan.days_range,
        "gpu_hours": plan.gpu_hours,
        "cost": plan.cost,
    }


def _stage_to_json(stage: StageMemory) -> dict[str, Any]:
    """Every part; what must be there (``required``); what nvidia-smi would show (``total``)."""
    return {
        **asdict(stage),
        "peak_in": stage.peak_in,
        "at_peak": memory_parts(stage),
        "allocated": stage.allocated,
        "required": stage.required,
        "total": stage.total,
    }


def layout_to_json(layout: Layout) -> dict[str, Any]:
    return {**asdict(layout), "micro_batches": layout.micro_batches}


def job_to_json(job: Job) -> dict[str, Any]:
    """The question, for the record: enough to ask it again."""
    device = job.cluster.device
    return {
        "model": job.name,
        "family": job.spec.family,
        "params": job.params,
        "active_params": count_active_params(job.spec),
        "gpu": device.name,
        "gpu_memory_bytes": device.memory_bytes,
        "n_gpus": job.cluster.n_gpus,
        "gpus_per_node": job.cluster.gpus_per_node,
        "backend": job.backend.name,
        "global_batch": job.global_batch,
        "seq_len": job.seq_len,
        "dtype": job.dtype,
        "tokens": job.tokens,
        "goodput": job.goodput,
        "price": job.price,
        "headroom": job.headroom,
        "profile": None if job.profile is None else asdict(job.profile),
    }
