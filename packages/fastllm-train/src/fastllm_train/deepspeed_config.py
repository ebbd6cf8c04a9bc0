"""The DeepSpeed configuration of a run: generated, shown by ``check``, never written by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fastllm_planner.arch import count_params
from fastllm_train.deepspeed_nvme import nvme_settings

if TYPE_CHECKING:
    from fastllm_train.config import Config
    from fastllm_train.precision import PrecisionConfig

MAX_REDUCE_BUCKET = 200_000_000
# Over micro-batches and over replicas: in bf16 the latter would round every micro-batch's sum.
_FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def effective_zero_stage(config: Config) -> tuple[int, str]:
    """The ZeRO stage that DeepSpeed gets, and why it is not the one asked for ("" if it is).

    DeepSpeed 0.19 runs bf16 and fp16 without ZeRO through ``FP16_UnfusedOptimizer``, whose set-up
    calls ``optimizer.step()`` once on zero gradients: Adam's step count starts at 1 and weight
    decay is applied before any data. ZeRO-1 keeps the same arithmetic and has no such step.

    Sums in fp32 are ZeRO-2's: with ZeRO-1 DeepSpeed takes another optimizer, whose sums are some
    six times less exact.
    """
    stage = config.parallel.zero_stage
    if stage < 2 and config.precision.separate_sums:
        return 2, "gradients that are added up in fp32 are cut over the replicas"
    if stage == 0 and config.parallel.ep > 1:
        return 1, "experts that are shared out over ranks run with ZeRO"
    if stage == 0 and config.precision.dtype != "fp32":
        return (
            1,
            f"DeepSpeed's {config.precision.dtype} optimizer without ZeRO takes a step at set-up",
        )
    return stage, ""


def reduce_bucket(config: Config) -> int:
    """Gradients that ZeRO reduces at once, in elements. DeepSpeed keeps a buffer of this size, by
    default 500 million elements however small the model is."""
    held = count_params(config.model.resolve()) // (config.parallel.tp * config.parallel.pp)
    return max(1, min(MAX_REDUCE_BUCKET, held))


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The dictionary given to ``deepspeed.initialize``. The optimizer itself is torch's, ours."""
    stage, _ = effective_zero_stage(config)
    parallel, batch, precision = config.parallel, config.batch, config.precision
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": reduce_bucket(config)}
    if stage == 3:
        # Small tensors (norm weights) stay whole; fetching them costs more than storing them.
        zero["stage3_param_persistence_threshold"] = 10_000
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    aio: dict[str, Any] = {}
    if parallel.nvme_path:
        nvme = nvme_settings(config)
        zero.update(nvme["zero_optimization"])
        aio = {"aio": nvme["aio"]}
    elif parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
        if parallel.offload == "optimizer+params":
            zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        # DeepSpeed counts the ranks of a sequence as replicas.
        "train_batch_size": batch.global_size * parallel.cp,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation(parallel.dp),
        "gradient_clipping": config.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision.dtype == "bf16"},
        "fp16": _fp16(precision) if precision.dtype == "fp16" else {"enabled": False},
        **(_FP32_SUMS if precision.separate_sums else {}),
        **aio,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def _fp16(precision: PrecisionConfig) -> dict[str, Any]:
    return {
        "enabled": True,
        "loss_scale": 0,  # dynamic
        "initial_scale_power": int(math.log2(precision.loss_scale)),
        "loss_scale_window": precision.loss_scale_window,
        "hysteresis": precision.loss_scale_hysteresis,
        "min_loss_scale": precision.min_loss_scale,
    }
