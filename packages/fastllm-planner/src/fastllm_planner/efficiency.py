"""How far real stacks are from the mechanistic model: effects of backend, device and their pair.

A *cell* is what one published series says about one (device, backend): the median of
log(measured / predicted) over its rows, the prediction being the model's without any factor.
``fit_effects`` explains the cells by random effects (backend + device + pair), shrunk towards zero
by how much evidence there is, with a variance *per series*: a hundred near-identical rows of one
series are one witness, not a hundred. A pair that nobody measured gets its backend's and its
device's effect; an unknown backend on an unknown device gets none.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastllm_planner.profile import Profile

# Standard deviations of log time, from published MFU by stack and device (docs/planner-accuracy.md).
BACKEND_SD = 0.10
DEVICE_SD = 0.06
PAIR_SD = 0.05
SERIES_SD = 0.07
ROW_SD = 0.10
# Relative half-width that four in five predictions stay within: pair known, half known, unknown.
SPREAD_KNOWN, SPREAD_PARTLY, SPREAD_UNKNOWN = 0.12, 0.20, 0.30


@dataclass(frozen=True)
class Cell:
    """``log_ratio``: median of log(measured seconds / predicted seconds) over ``rows`` rows."""

    series: str
    gpu: str
    backend: str
    rows: int
    log_ratio: float


@dataclass(frozen=True)
class Effects:
    """Fitted log effects by backend, by device and by (device, backend)."""

    backend: dict[str, float]
    device: dict[str, float]
    pair: dict[tuple[str, str], float]

    def profile(self, gpu: str, backend: str) -> Profile:
        """Efficiency profile of a (device, backend), seen or not."""
        log = self.backend.get(backend, 0.0) + self.device.get(gpu, 0.0)
        log += self.pair.get((gpu, backend), 0.0)
        known = (backend in self.backend) + (gpu in self.device)
        spread = (SPREAD_UNKNOWN, SPREAD_PARTLY, SPREAD_PARTLY)[known]
        if (gpu, backend) in self.pair:
            spread = SPREAD_KNOWN
        factor = math.exp(log)
        return Profile(gpu, backend, factor, factor, spread)


def fit_effects(cells: Iterable[Cell]) -> Effects:
    """Posterior means of the effects (ridge regression with the prior variances above)."""
    rows = list(cells)
    backends = sorted({c.backend for c in rows})
    devices = sorted({c.gpu for c in rows})
    pairs = sorted({(c.gpu, c.backend) for c in rows})
    size = len(backends) + len(devices) + len(pairs)
    matrix = [[0.0] * size for _ in range(size)]
    right = [0.0] * size
    variances = [BACKEND_SD**2] * len(backends)
    variances += [DEVICE_SD**2] * len(devices) + [PAIR_SD**2] * len(pairs)
    for i, variance in enumerate(variances):
        matrix[i][i] = 1.0 / variance
    for cell in rows:
        weight = 1.0 / (SERIES_SD**2 + ROW_SD**2 / cell.rows)
        at = (
            backends.index(cell.backend),
            len(backends) + devices.index(cell.gpu),
            len(backends) + len(devices) + pairs.index((cell.gpu, cell.backend)),
        )
        for i in at:
            right[i] += weight * cell.log_ratio
            for j in at:
                matrix[i][j] += weight
    solution = _solve(matrix, right)
    middle = len(backends) + len(devices)
    return Effects(
        backend=dict(zip(backends, solution, strict=False)),
        device=dict(zip(devices, solution[len(backends) :], strict=False)),
        pair=dict(zip(pairs, solution[middle:], strict=True)),
    )


def _solve(matrix: list[list[float]], right: Sequence[float]) -> list[float]:
    """Gaussian elimination; the matrix is symmetric positive definite, so it needs no pivoting."""
    size = len(right)
    rows = [[*row, right[i]] for i, row in enumerate(matrix)]
    for i in range(size):
        for j in range(i + 1, size):
            share = rows[j][i] / rows[i][i]
            if share:
                for k in range(i, size + 1):
                    rows[j][k] -= share * rows[i][k]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][k] * solution[k] for k in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution


@cache
def shipped_cells() -> tuple[Cell, ...]:
    """Cells of the published series that this version was fitted on (``efficiency.toml``)."""
    text = files("fastllm_planner").joinpath("efficiency.toml").read_text(encoding="utf-8")
    return tuple(Cell(**raw) for raw in tomllib.loads(text).get("cell", []))


@cache
def _shipped_effects() -> Effects:
    return fit_effects(shipped_cells())


@cache
def default_profile(gpu: str, backend: str) -> Profile:
    """The shipped profile of a (device, backend): what a plan uses without ``--profile``."""
    return _shipped_effects().profile(gpu, backend)
