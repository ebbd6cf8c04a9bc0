"""Traced memory of a config's pipeline stages beside the planner's prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastllm_planner.arch import ArchSpec
from fastllm_planner.backends import backend
from fastllm_planner.errors import UserError as PlannerError
from fastllm_planner.hardware import GIB, Cluster, gpu
from fastllm_planner.layout import Layout
from fastllm_planner.memory import StageMemory, estimate_memory
from fastllm_train.config import Config
from fastllm_train.deepspeed_config import effective_zero_stage
from fastllm_train.engine_choice import chosen_engine, cuts_states, splits_masters
from fastllm_train.errors import UserError

# The prediction's bytes do not depend on the device; a cluster needs one.
ANY_GPU = "H100-SXM"


def refuse_untraceable(config: Config) -> None:
    """``UserError`` for what the trace does not follow."""
    if chosen_engine(config) == "torch":
        return
    if config.parallel.zero_stage == 3 or config.parallel.offload != "none":
        raise UserError(
            "the memory trace follows ZeRO 0 to 2 without offload",
            hint="leave out --memory, or ask the planner: fastllm-planner estimate",
        )


def memory_report(config: Config, spec: ArchSpec, gpu_name: str | None) -> dict[str, Any]:
    """JSON-ready: each traced stage's peak and the planner's; with ``gpu_name``, whether the
    fullest rank fits beside the runtime's own memory and the allocator's fragmentation."""
    from fastllm_train.trace.step import stages_to_trace, trace_stage

    refuse_untraceable(config)
    cluster = _cluster(config, gpu_name or ANY_GPU)
    predicted = predict(config, spec, cluster)
    rows: list[dict[str, Any]] = []
    for stage in stages_to_trace(config.parallel.pp):
        found = trace_stage(config, spec, stage)
        rows.append(
            {
                "stage": stage,
                "layers": found.layers,
                "params": found.params,
                "peak_bytes": found.peak.total,
                "peak_in": found.peak.phase,
                "by_category": found.peak.by_category,
                "planner_layers": predicted[stage].layers,
                "planner_bytes": round(predicted[stage].allocated),
            }
        )
    report: dict[str, Any] = {"schema": 1, "stages": rows}
    if gpu_name:
        fullest = max(row["peak_bytes"] for row in rows)
        share = 1.0 + predicted[0].fragmentation_share
        needed = fullest * share + predicted[0].overhead
        report |= {
            "gpu": cluster.gpu.name,
            "gpu_bytes": cluster.device.memory_bytes,
            "needed_bytes": round(needed),
            "fits": needed <= cluster.device.memory_bytes,
        }
    return report


def predict(config: Config, spec: ArchSpec, cluster: Cluster) -> tuple[StageMemory, ...]:
    """The planner's estimate for the same layout, stage by stage."""
    parallel, batch = config.parallel, config.batch
    stack, stage = backend("fastllm"), effective_zero_stage(config)[0]
    if chosen_engine(config) == "torch":
        stage = parallel.zero_stage if cuts_states(config) else 0
        if not splits_masters(config):
            whole = {"optimizer_bytes": stack.optimizer_bytes}
            stack = replace(stack, second_engine={**stack.second_engine, **whole})
    else:
        stack = replace(stack, second_engine={})
    layout = Layout(
        dp=parallel.dp,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        ep=parallel.ep,
        zero_stage=stage,
        micro_batch=batch.micro,
        global_batch=batch.global_size,
        seq_len=batch.seq_len,
        recompute=parallel.recompute,
        sequence_parallel=parallel.sequence_parallel,
        dtype=config.precision.dtype,
    )
    return estimate_memory(spec, layout, cluster, stack).stages


def memory_text(report: dict[str, Any]) -> str:
    """A table, bytes in GiB, and the verdict if there is one."""
    names = ("weights", "optimizer", "gradients", "activations")
    head = f"{'stage':>5}{'layers':>8}{'peak GiB':>10}  " + "".join(f"{n:>13}" for n in names)
    lines = ["traced memory of a rank", head + f"{'other':>8}  {'peak in':<16}{'planner':>8}"]
    for row in report["stages"]:
        by = row["by_category"]
        other = row["peak_bytes"] - sum(by.get(name, 0) for name in names)
        shares = "".join(f"{by.get(name, 0) / GIB:>13.2f}" for name in names)
        lines.append(
            f"{row['stage']:>5}{row['layers']:>8}{row['peak_bytes'] / GIB:>10.2f}  {shares}"
            f"{other / GIB:>8.2f}  {row['peak_in']:<16}{row['planner_bytes'] / GIB:>8.2f}"
        )
    if "fits" in report:
        verdict = "fits" if report["fits"] else "does not fit"
        lines.append(
            f"{verdict}: {report['needed_bytes'] / GIB:.1f} GiB with the runtime and the "
            f"allocator's fragmentation, {report['gpu']} has {report['gpu_bytes'] / GIB:.1f}"
        )
    return "\n".join(lines)


def _cluster(config: Config, name: str) -> Cluster:
    try:
        return Cluster(gpu(name), config.parallel.world_size)
    except PlannerError as error:
        raise UserError(str(error), hint=error.hint) from error
