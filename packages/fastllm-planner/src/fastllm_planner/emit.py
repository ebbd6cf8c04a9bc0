"""What the next tool reads: ``train.toml`` for fastllm-train, DeepSpeed's JSON, launch scripts.

The format follows from the file's name. Everything is written beside the target under a temporary
name, fsynced and renamed, so that a target is whole or absent.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from fastllm_planner.arch import preset_names
from fastllm_planner.deepspeed_config import deepspeed_config
from fastllm_planner.errors import UserError
from fastllm_planner.plan import Job, Plan
from fastllm_planner.plan_text import strategy_words, verdict
from fastllm_planner.trainer import BACKEND, job_reasons, layout_reasons


def trains(targets: Iterable[Path]) -> bool:
    """Whether a target is for fastllm-train: its config, or a script that launches it."""
    return any(target.suffix in (".toml", ".sh") for target in targets)


def check_job(job: Job) -> None:
    """``UserError`` where fastllm-train could run no layout of the job."""
    if job.backend.name != BACKEND:
        raise UserError(
            "train.toml and launch scripts are for fastllm-train, "
            f"the plan is for {job.backend.name}",
            f"plan with --backend {BACKEND}",
        )
    for reason in job_reasons(job):
        raise UserError(f"nothing to emit: fastllm-train {reason}", "plan without --emit")


def check_plan(plan: Plan) -> None:
    """``UserError`` where fastllm-train could not run this layout."""
    check_job(plan.job)
    lacking = layout_reasons(plan.job.spec, plan.layout)
    if lacking:
        axis = lacking[0].partition("=")[0]
        raise UserError(
            f"fastllm-train does not run {', '.join(lacking)} yet", f"plan with --fix {axis}=1"
        )
    if plan.memory.nvme_bytes:
        raise UserError(
            "fastllm-train offloads to host memory only, this layout needs NVMe",
            "plan without --nvme",
        )


def check_targets(targets: Iterable[Path]) -> None:
    """``UserError`` for a name that says no format or a folder that is not there."""
    for target in targets:
        _format_of(target)
        if not target.parent.is_dir():
            raise UserError(f"no folder {target.parent}", f"mkdir -p {target.parent}")


def emit_plan(plan: Plan, target: Path, *, model: str) -> None:
    """Write ``plan`` to ``target`` in the format of its name; ``model`` as the user named it."""
    if target.suffix != ".toml" and (plan.job.backend.name == BACKEND or trains([target])):
        check_plan(plan)
    write_text(target, _format_of(target)(plan, model), executable=target.suffix == ".sh")


def _format_of(target: Path) -> Callable[[Plan, str], str]:
    if target.suffix == ".toml":
        return train_toml
    if target.suffix == ".json":
        return lambda plan, _: json.dumps(deepspeed_config(plan), indent=2) + "\n"
    if target.suffix == ".sh":
        return slurm_script if "slurm" in target.stem else torchrun_script
    raise UserError(
        f"--emit {target.name}: the name says no format",
        "use train.toml, deepspeed.json, slurm.sh or torchrun.sh",
    )


def write_text(target: Path, text: str, *, executable: bool = False) -> None:
    """Atomic: the old file, or the whole new one."""
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod((0o777 if executable else 0o666) & ~mask)
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def train_toml(plan: Plan, model: str) -> str:
    """[model], [parallel], [batch] and [precision] of a fastllm-train config."""
    check_plan(plan)
    layout, job = plan.layout, plan.job
    if model.lower() in preset_names():
        source = f'preset = "{model.lower()}"'
    else:
        source = f"hf_config = {json.dumps(str(Path(model).resolve()))}"
    return "\n".join(
        [
            f"# {verdict(plan)}",
            "# Written by fastllm-planner; name this file as the base of a training config.",
            "[model]",
            source,
            "[parallel]",
            f"dp = {layout.dp}",
            f"tp = {layout.tp}",
            f"pp = {layout.pp}",
            f"cp = {layout.cp}",
            f"ep = {layout.ep}",
            f"sequence_parallel = {str(layout.sequence_parallel).lower()}",
            f"virtual_stages = {layout.virtual_stages}",
            f"zero_stage = {layout.zero_stage}",
            f'offload = "{layout.offload}"',
            f'recompute = "{layout.recompute}"',
            "[batch]",
            f"micro = {layout.micro_batch}",
            f"global = {layout.global_batch}",
            f"seq_len = {layout.seq_len}",
            "[precision]",
            f'dtype = "{job.dtype}"',
            "",
        ]
    )


def torchrun_script(plan: Plan, model: str) -> str:
    """One command per node; the rendezvous comes from the environment."""
    del model
    cluster = plan.job.cluster
    nodes = cluster.nodes
    launch = _torchrun(cluster.gpus_per_node, nodes)
    usage = "bash torchrun.sh config.toml"
    if nodes > 1:
        usage = f"NODE_RANK=0..{nodes - 1} MASTER_ADDR=HOST {usage}, on each of {nodes} nodes"
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {verdict(plan)}",
            f"# {strategy_words(plan.layout)}",
            f"# Usage: {usage}",
            "set -euo pipefail",
            'config="${1:?usage: torchrun.sh config.toml}"',
            "shift",
            f'exec {launch} -m fastllm_train run "$config" "$@"',
            "",
        ]
    )


def slurm_script(plan: Plan, model: str) -> str:
    """``sbatch slurm.sh config.toml``: one torchrun per node, rendezvous on the first."""
    cluster = plan.job.cluster
    del model
    name = "fastllm-" + re.sub(r"[^A-Za-z0-9._-]+", "-", plan.job.name)
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name={name}",
            f"#SBATCH --nodes={cluster.nodes}",
            "#SBATCH --ntasks-per-node=1",
            f"#SBATCH --gpus-per-node={cluster.gpus_per_node}",
            "#SBATCH --exclusive",
            "#SBATCH --output=%x-%j.log",
            f"# {verdict(plan)}",
            f"# {strategy_words(plan.layout)}",
            "# Usage: sbatch slurm.sh config.toml",
            "set -euo pipefail",
            'config="${1:?usage: sbatch slurm.sh config.toml}"',
            "shift",
            'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            "export MASTER_PORT=29500",
            "srun --kill-on-bad-exit=1 bash -c 'export NODE_RANK=$SLURM_NODEID; exec "
            f'{_torchrun(cluster.gpus_per_node, cluster.nodes)} -m fastllm_train run "$@"\' '
            '_ "$config" "$@"',
            "",
        ]
    )


def _torchrun(per_node: int, nodes: int) -> str:
    if nodes == 1:
        return f"torchrun --standalone --nproc-per-node {per_node}"
    return (
        f"torchrun --nnodes {nodes} --nproc-per-node {per_node} "
        '--node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}" '
        '--master-port "${MASTER_PORT:-29500}"'
    )
