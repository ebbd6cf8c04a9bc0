"""A window of steps under torch.profiler ([profile])."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm_train.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ProfileConfig:
    """``steps`` steps from ``first_step`` on (0: none) of the ranks in ``ranks`` are traced into
    OUT/profile/rank-N.json.gz, for chrome://tracing or Perfetto. ``memory`` adds allocations."""

    first_step: int = 0
    steps: int = 3
    ranks: tuple[int, ...] = (0,)
    memory: bool = False

    def __post_init__(self) -> None:
        if self.first_step < 0 or self.steps < 1:
            raise UserError(
                f"profile.first_step={self.first_step}, profile.steps={self.steps}: no window",
                hint="profile.first_step=10 and profile.steps=3, for example",
            )


class ProfileWindow:
    """Call ``before`` every step, and ``close`` at the end."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int) -> None:
        self._config, self._file = config, folder / "profile" / f"rank-{rank:05d}.json.gz"
        self._wanted = config.first_step > 0 and rank in config.ranks
        self._profiler: torch.profiler.profile | None = None
        self._end = config.first_step + config.steps

    def before(self, step: int) -> None:
        """Step ``step`` is about to begin."""
        if self._profiler is not None and step >= self._end:
            self.close()
        elif self._wanted and self._config.first_step <= step < self._end:
            if self._profiler is None:
                import torch

                activities = torch.profiler.supported_activities()
                self._profiler = torch.profiler.profile(
                    activities=activities, profile_memory=self._config.memory
                )
                self._profiler.start()
            else:
                self._profiler.step()

    def close(self) -> None:
        """Write what was traced, if anything was."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._file))
        self._profiler = None
        self._wanted = False
