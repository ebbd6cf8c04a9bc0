"""Loss spikes and numbers that are none ([spikes]): how they are seen, and what is done then.

Going back to the last checkpoint and past the data that led there is what PaLM's authors did by
hand (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Literal

from fastllm_train.errors import UserError


@dataclass(frozen=True)
class SpikesConfig:
    """``policy`` "stop" ends the run before anything is saved; "skip" leaves the step's update out
    on all ranks, at most ``max_skips`` times in a row; "rewind" goes back to the last checkpoint
    and trains on past the samples since then, at most ``max_rewinds`` times.

    A loss or gradient norm that is not finite always counts. With ``factor`` > 0 so does a loss of
    more than ``factor`` times the median of the last ``window`` steps' (at least half of them).
    """

    policy: Literal["stop", "skip", "rewind"] = "stop"
    factor: float = 0.0
    window: int = 64
    max_rewinds: int = 3
    max_skips: int = 10

    def __post_init__(self) -> None:
        if self.factor != 0 and not self.factor > 1:
            raise UserError(f"spikes.factor={self.factor} is neither 0 nor above 1")
        if self.window < 2:
            raise UserError(f"spikes.window={self.window} is below 2")
        for name in ("max_rewinds", "max_skips"):
            if getattr(self, name) < 0:
                raise UserError(f"spikes.{name}={getattr(self, name)} is negative")


class SpikeWatch:
    """Sees every step's loss and norm, the same on all ranks; so all come to the same verdict."""

    def __init__(self, config: SpikesConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)

    def verdict(self, loss: float, grad_norm: float, *, overflow: bool = False) -> str | None:
        """What is wrong with a step, or None; only then does it count for the median.
        ``overflow``: gradients were scaled too high, which the loss scale sees to."""
        if not (math.isfinite(loss) and (overflow or math.isfinite(grad_norm))):
            return f"loss {loss}, gradient norm {grad_norm}"
        factor = self._config.factor
        if factor and len(self._losses) >= self._config.window // 2:
            median = statistics.median(self._losses)
            if loss > factor * median:
                return f"loss {loss:.4g} is over {factor:g} times the median {median:.4g}"
        self._losses.append(loss)
        return None

    def forget(self) -> None:
        """After going back: the losses to compare with are those from there on."""
        self._losses.clear()
