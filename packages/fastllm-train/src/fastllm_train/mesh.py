"""Process groups of a job: ranks that share a tensor, a sequence, a replica or the data's order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch.distributed as dist

from fastllm_train.layout import AXES, Coordinates, ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates and groups. Its methods are what DeepSpeed asks of an ``mpu``.

    ``data_group``: ranks that hold the same weights and see other tokens (data and context
    parallel). ``model_group``: ranks that together hold one replica (tensor and pipeline).
    ``expert_group``: ranks that share out the experts; ``expert_data_group``: ranks that hold the
    same experts. ``forward_group`` and ``backward_group``: the pipeline's stages, once for each
    direction: on a GPU each is a communicator with a stream of its own, so that a send one way
    never waits for a receive the other way.
    """

    parallel: ParallelConfig
    at: Coordinates
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    expert_group: dist.ProcessGroup
    expert_data_group: dist.ProcessGroup
    forward_group: dist.ProcessGroup
    backward_group: dist.ProcessGroup

    @property
    def tp(self) -> int:
        return self.parallel.tp

    @property
    def tp_rank(self) -> int:
        return self.at.tp

    @property
    def first_stage(self) -> bool:
        return self.at.pp == 0

    @property
    def last_stage(self) -> bool:
        return self.at.pp == self.parallel.pp - 1

    def get_model_parallel_rank(self) -> int:
        return self.at.pp * self.parallel.tp + self.at.tp

    def get_model_parallel_world_size(self) -> int:
        return self.parallel.tp * self.parallel.pp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model_group

    def get_data_parallel_rank(self) -> int:
        return self.at.dp(self.parallel) * self.parallel.cp + self.at.cp

    def get_data_parallel_world_size(self) -> int:
        return self.parallel.dp * self.parallel.cp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

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
    """The groups of this rank (``Coordinates`` says how ranks are numbered). Collective."""
    rank = dist.get_rank()
    made: dict[tuple[str, ...], dist.ProcessGroup] = {}

    def group(*varying: str, fresh: bool = False) -> dist.ProcessGroup:
        sizes = parallel.axis_sizes()
        key = tuple(axis for axis in AXES if axis in varying and sizes[axis] > 1)
        if key not in made or fresh:
            mine = None
            for ranks in groups_of(parallel, key):
                one = dist.new_group(ranks)
                mine = one if rank in ranks else mine
            assert isinstance(mine, dist.ProcessGroup)
            made[key] = mine
        return made[key]

    return Mesh(
        parallel,
        parallel.coordinates(rank),
        tp_group=group("tp"),
        cp_group=group("cp"),
        data_group=group("edp", "ep", "cp"),
        model_group=group("pp", "tp"),
        expert_group=group("ep"),
        expert_data_group=group("edp", "cp"),
        forward_group=group("pp"),
        backward_group=group("pp", fresh=parallel.pp > 1),
    )


def groups_of(parallel: ParallelConfig, varying: tuple[str, ...]) -> list[list[int]]:
    """The ranks of the job, parted into groups in which only ``varying`` coordinates differ."""
    sizes = parallel.axis_sizes()
    fixed = [axis for axis in AXES if axis not in varying]
    found = []
    for values in itertools.product(*(range(sizes[axis]) for axis in fixed)):
        held = dict(zip(fixed, values, strict=True))
        ranks = [
            parallel.rank_of(Coordinates(**held, **dict(zip(varying, free, strict=True))))
            for free in itertools.product(*(range(sizes[axis]) for axis in varying))
        ]
        found.append(ranks)
    return found
