"""Who is slow: every rank's time by phase, gathered now and then."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

PHASES = ("data", "forward", "backward", "optimizer")


class RankTimes:
    """Sums a rank's seconds by phase between two exchanges."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._steps = 0

    def add(self, phase_s: Mapping[str, float]) -> None:
        for phase in PHASES:
            self._sums[phase] += phase_s.get(phase, 0.0)
        self._steps += 1

    def exchange(self) -> dict[str, object]:
        """Mean seconds of a step by phase, one number a rank, as a record's values. Collective."""
        steps = max(1, self._steps)
        mine = [self._sums[phase] / steps for phase in PHASES]
        sent = torch.tensor(mine, dtype=torch.float64, device=self._device)
        got = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
        dist.all_gather(got, sent)
        table = torch.stack(got).T.tolist()
        found = {"steps": steps, "phase_s": dict(zip(PHASES, table, strict=True))}
        self._sums, self._steps = dict.fromkeys(PHASES, 0.0), 0
        return found
