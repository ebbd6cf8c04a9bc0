"""What a config resolves to, as plain data (``fastllm-train check``)."""

from __future__ import annotations

from typing import Any

from fastllm_planner.arch import ArchSpec, count_params, spec_to_dict
from fastllm_planner.flops import model_flops_per_token
from fastllm_train.config import Config, to_table
from fastllm_train.deepspeed_config import deepspeed_config, effective_zero_stage
from fastllm_train.engine_choice import chosen_engine, cuts_states, only_deepspeed
from fastllm_train.schedule import planned_steps


def summarise(config: Config, spec: ArchSpec) -> dict[str, Any]:
    """JSON-ready. Assumes that ``refusals.refuse`` let the config pass."""
    table = to_table(config)
    by_deepspeed = chosen_engine(config) == "deepspeed"
    if by_deepspeed:
        stage, note = effective_zero_stage(config)
    elif cuts_states(config):
        stage, note = config.parallel.zero_stage, ""
    else:
        stage, note = 0, "one replica: nothing is cut" if config.parallel.zero_stage else ""
    steps, seq_len = planned_steps(config.schedule, config.batch), config.batch.seq_len
    return {
        "schema": 1,
        "config": table,
        "arch": spec_to_dict(spec),
        "params": count_params(spec),
        "parallel": table["parallel"],
        "batch": table["batch"],
        "world_size": config.parallel.world_size,
        "accumulation": config.batch.accumulation(config.parallel.dp),
        "engine": chosen_engine(config),
        "only_deepspeed": only_deepspeed(config),
        "zero_stage": stage,
        "zero_note": note,
        "tokens_per_step": config.batch.global_size * seq_len,
        "steps": steps,
        "tokens": config.batch.samples_after(steps) * seq_len,
        "flops_per_token_full": model_flops_per_token(spec, seq_len, "full"),
        "deepspeed_config": deepspeed_config(config) if by_deepspeed else None,
    }
