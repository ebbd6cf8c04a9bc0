"""A plan as DeepSpeed's JSON configuration (deepspeed.ai/docs/config-json)."""

from __future__ import annotations

from typing import Any

from fastllm_planner.plan import Plan
from fastllm_planner.trainer import BACKEND

# Where a node's drives are mounted: only its owner knows, this is DeepSpeed's documentation's name.
NVME_PATH = "/local_nvme"


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """Batch, precision, ZeRO and offload. DeepSpeed takes model parallelism from the program."""
    layout, job = plan.layout, plan.job
    ours = job.backend.name == BACKEND  # its optimizer is torch's, its host memory not pinned
    config: dict[str, Any] = {
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.micro_batches,
        "gradient_clipping": 1.0,
        "zero_optimization": _zero(plan),
        "wall_clock_breakdown": False,
    }
    if job.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        if job.backend.bf16_extra_grad_bytes:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif job.dtype == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0}
    if layout.offload != "none":
        config["zero_force_ds_cpu_optimizer"] = not ours
    if layout.recompute == "full":
        config["activation_checkpointing"] = {"partition_activations": layout.tp > 1}
    return config


def _zero(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    zero: dict[str, Any] = {"stage": layout.zero_stage}
    if layout.zero_stage >= 1:
        # One pipeline stage reduces once per step, so hiding it behind backward needs pp = 1.
        zero |= {"overlap_comm": layout.pp == 1, "contiguous_gradients": True}
    pinned = plan.job.backend.name != BACKEND
    target: dict[str, Any] = {"device": "cpu", "pin_memory": pinned}
    if plan.memory.nvme_bytes:
        target = {"device": "nvme", "nvme_path": NVME_PATH, "pin_memory": pinned}
    if layout.offload != "none":
        zero["offload_optimizer"] = dict(target)
    if layout.offload == "optimizer+params":
        zero["offload_param"] = dict(target)
    return zero
