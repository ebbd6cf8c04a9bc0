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
from fastllm_planner.plan import Plan
from fastllm_planner.plan_text import strategy_words, verdict

# Axes of the search that this version of fastllm-train runs at one size only
# (tests/contracts/test_emitted_configs.py asks the trainer).
TRAINER_SIZES = {"pp": 1, "cp": 1, "ep": 1, "virtual_stages": 1}


def trainer_pins(targets: Iterable[Path]) -> dict[str, int]:
    """Where a train.toml is wanted, search only what the trainer runs."""
    wanted = any(target.suffix == ".toml" for target in targets)
    return dict(TRAINER_SIZES) if wanted else {}


def check_targets(targets: Iterable[Path]) -> None:
    """``UserError`` for a name that says no format or a folder that is not there."""
    for target in targets:
        _format_of(target)
        if not target.parent.is_dir():
            raise UserError(f"no folder {target.parent}", f"mkdir -p {target.parent}")


def emit_plan(plan: Plan, target: Path, *, model: str) -> None:
    """Write ``plan`` to ``target`` in the format of its name; ``model`` as the user named it."""
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
    layout, job = plan.layout, plan.job
    if job.backend.name != "fastllm":
        raise UserError(
            f"a train.toml is for fastllm-train, the plan is for {job.backend.name}",
            "plan with --backend fastllm",
        )
    for axis, size in TRAINER_SIZES.items():
        if getattr(layout, axis) != size:
            raise UserError(
                f"fastllm-train does not run {axis}={getattr(layout, axis)} yet",
                f"plan with --fix {axis}={size}",
            )
    if job.dtype not in ("fp32", "bf16"):
        raise UserError(f"fastllm-train runs bf16 and fp32, not {job.dtype}", "plan with --dtype")
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
