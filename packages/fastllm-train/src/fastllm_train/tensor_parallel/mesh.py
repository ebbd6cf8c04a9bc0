"""Process groups of a job: ranks that share a model (tensor) and ranks that share data's order."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from fastllm_train.layout import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """This rank's groups. Its methods are what DeepSpeed asks of an ``mpu``."""

    tp: int
    dp: int
    tp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    def get_model_parallel_rank(self) -> int:
        return self.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.dp_group

    def subgroup(self, copies: int) -> dist.ProcessGroup:
        """The ``copies`` tensor-parallel neighbours that hold the same shard. Collective."""
        group = None
        for first in range(0, dist.get_world_size(), copies):
            ranks = list(range(first, first + copies))
            made = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                group = made
        assert isinstance(group, dist.ProcessGroup)
        return group


def build_mesh(parallel: ParallelConfig) -> Mesh:
    """Tensor-parallel ranks are neighbours: rank = dp_rank * tp + tp_rank. Collective."""
    tp, dp, rank = parallel.tp, parallel.dp, dist.get_rank()
    tp_group = dp_group = None
    for replica in range(dp):
        ranks = list(range(replica * tp, (replica + 1) * tp))
        made = dist.new_group(ranks)
        tp_group = made if rank in ranks else tp_group
    for shard in range(tp):
        ranks = list(range(shard, dp * tp, tp))
        made = dist.new_group(ranks)
        dp_group = made if rank in ranks else dp_group
    assert isinstance(tp_group, dist.ProcessGroup)
    assert isinstance(dp_group, dist.ProcessGroup)
    return Mesh(tp, dp, rank % tp, rank // tp, tp_group, dp_group)
