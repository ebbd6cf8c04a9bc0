"""What starts a job: one command on this machine, files for a cluster (``launch``)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fastllm_train.errors import UserError

PORT = 29500
NOTICE_S = 300  # between Slurm's notice and the end of the time limit


@dataclass(frozen=True)
class Job:
    """``run``: the arguments after ``fastllm-train``; ``processes`` in all, evenly over ``nodes``
    machines; a failed job is started again up to ``max_restarts`` times."""

    name: str
    run: Sequence[str]
    processes: int
    nodes: int
    max_restarts: int
    gpus: bool

    def __post_init__(self) -> None:
        if self.processes % self.nodes:
            raise UserError(
                f"{self.processes} processes (dp*tp*pp*cp) do not divide over {self.nodes} nodes",
                hint="change --nodes, or parallel.dp",
            )

    @property
    def per_node(self) -> int:
        return self.processes // self.nodes


def torchrun_command(job: Job) -> list[str]:
    """The command of the only node: torchrun, which starts the ranks again when one dies."""
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone"),
        f"--nproc-per-node={job.per_node}",
        f"--max-restarts={job.max_restarts}",
        *("-m", "fastllm_train", *job.run),
    ]


def cluster_files(job: Job) -> dict[str, str]:
    """File name → content: for Slurm, for torchrun on every node, for the deepspeed launcher."""
    return {
        "job.sbatch": _slurm(job),
        "torchrun.sh": _torchrun(job),
        "deepspeed.sh": _deepspeed(job),
        "hostfile": _hostfile(job),
    }


def _slurm(job: Job) -> str:
    gpus = f"#SBATCH --gpus-per-node={job.per_node}\n" if job.gpus else ""
    run = shlex.join(["fastllm-train", *job.run])
    return f"""#!/bin/bash
# sbatch {job.name}/job.sbatch; add your account, partition, time limit and modules.
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node={job.per_node}
{gpus}#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@{NOTICE_S}
# The ranks get SIGTERM {NOTICE_S} s before the time limit, and on preemption: they save and end
# with status 0.
set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT={PORT}
export THP_MEM_ALLOC_ENABLE=1
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  export LOCAL_WORLD_SIZE={job.per_node}
  exec "$@"' rank {run}
status=$?
# A rank was lost: start again from the last checkpoint, {job.max_restarts} times at most.
if [ $status -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
"""


def _torchrun(job: Job) -> str:
    run = shlex.join(["-m", "fastllm_train", *job.run])
    return f"""#!/bin/bash
# On every node: MASTER_ADDR=<first node> bash torchrun.sh
set -eu
# A store for every restart: in the one that torchrun shares, ranks would find the dead ones' keys.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export THP_MEM_ALLOC_ENABLE=1
exec torchrun --nnodes={job.nodes} --nproc-per-node={job.per_node} \\
  --max-restarts={job.max_restarts} --rdzv-backend=c10d --rdzv-id={shlex.quote(job.name)} \\
  --rdzv-endpoint="$MASTER_ADDR:{PORT}" {run}
"""


def _deepspeed(job: Job) -> str:
    return f"""#!/bin/bash
# On one node that reaches the others by ssh; name them in the hostfile.
set -eu
exec deepspeed --hostfile "$(dirname "$0")/hostfile" --no_local_rank --module \\
  fastllm_train {shlex.join(job.run)}
"""


def _hostfile(job: Job) -> str:
    return "".join(f"node{number} slots={job.per_node}\n" for number in range(1, job.nodes + 1))
