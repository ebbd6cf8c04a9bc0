"""How far real stacks are from the mechanistic model: effects of backend, device and their pair.

A *cell* is what one published series says about one (device, backend): the median of
log(measured / predicted) over its rows, the prediction being the model's without any factor.
``fit_effects`` explains the cells by random effects (family of stacks + backend + device + pair),
shrunk towards zero by how much evidence there is, with a variance *per series*: a hundred
near-identical rows of one series are one witness, not a hundred. A pair that nobody measured gets
the effects of its family, backend and device; an unknown stack on an unknown device gets none.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastllm_planner.arch import ArchSpec
from fastllm_planner.backends import backend as backend_by_name
from fastllm_planner.hardware import Gpu
from fastllm_planner.layout import Layout
from fastllm_planner.profile import Profile

# Standard deviations of log time between stacks, devices and series. Small: on 140 runs of twelve
# further series, trusting other series more made predictions worse
# (docs/planner-accuracy.md).
FAMILY_SD = 0.04
BACKEND_SD = 0.04
DEVICE_SD = 0.03
PAIR_SD = 0.02
SERIES_SD = 0.10
ROW_SD = 0.10
# Degrees of freedom of the noise between series: heavy tails, odd series happen.
T_FREEDOM = 4.0
ROUNDS = 20
# Relative half-width that four in five predictions stay within: pair known, half known, unknown.
SPREAD_KNOWN, SPREAD_PARTLY, SPREAD_UNKNOWN = 0.15, 0.22, 0.30
# What widens it where nobody calibrated, in quadrature: parts of the model that no or few published
# rows were compared with. Judgements, not fits (docs/planner-accuracy.md).
SPREAD_MOE, SPREAD_OFFLOAD, SPREAD_FP8, SPREAD_CPU = 0.20, 0.30, 0.08, 0.50
WIDEST = 0.60


_Key = tuple[str, ...]


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
    """Fitted log effects by key: a family, a backend, a device or a (device, backend)."""

    values: dict[_Key, float]

    def profile(self, gpu: str, backend: str) -> Profile:
        """Efficiency profile of a (device, backend), seen or not."""
        keys = _keys(gpu, backend)
        factor = math.exp(sum(self.values.get(key, 0.0) for key in keys))
        if ("pair", gpu, backend) in self.values:
            spread = SPREAD_KNOWN
        else:
            # A related stack says less than this stack or this device would.
            seen = any(key in self.values for key in keys if key[0] != "family")
            spread = SPREAD_PARTLY if seen else SPREAD_UNKNOWN
        return Profile(gpu, backend, factor, factor, spread)


_SD = {"family": FAMILY_SD, "backend": BACKEND_SD, "device": DEVICE_SD, "pair": PAIR_SD}


def _keys(gpu: str, backend: str) -> tuple[tuple[str, ...], ...]:
    family = backend_by_name(backend).family
    return (("family", family), ("backend", backend), ("device", gpu), ("pair", gpu, backend))


def fit_effects(cells: Iterable[Cell]) -> Effects:
    """Posterior modes of the effects, with Gaussian priors and Student-t noise between series.

    A series that is far from everything else is more likely to be odd itself (another batch than
    stated, a slow network) than to tell how fast its stack is elsewhere: its weight falls with the
    square of its distance. Iterated re-weighting from no effect at all (Lange, Little and Taylor,
    JASA 84, 1989), so that one strange series alone moves nothing far.
    """
    rows = [(cell, _keys(cell.gpu, cell.backend)) for cell in cells]
    names = sorted({key for _, keys in rows for key in keys})
    values = dict.fromkeys(names, 0.0)
    for _ in range(ROUNDS):
        weights = [
            _weight(cell, cell.log_ratio - sum(values[key] for key in keys)) for cell, keys in rows
        ]
        values = _ridge(rows, weights, names)
    return Effects(values)


def _weight(cell: Cell, residual: float) -> float:
    """Precision of one cell under Student-t noise, at its present residual."""
    variance = SERIES_SD**2 + ROW_SD**2 / cell.rows
    return (T_FREEDOM + 1.0) / (T_FREEDOM + residual**2 / variance) / variance


def _ridge(
    rows: Sequence[tuple[Cell, tuple[_Key, ...]]], weights: Sequence[float], names: list[_Key]
) -> dict[_Key, float]:
    """Weighted least squares with the prior variances of the effects."""
    index = {key: i for i, key in enumerate(names)}
    matrix = [[0.0] * len(names) for _ in names]
    right = [0.0] * len(names)
    for key, i in index.items():
        matrix[i][i] = 1.0 / _SD[key[0]] ** 2
    for (cell, keys), weight in zip(rows, weights, strict=True):
        at = [index[key] for key in keys]
        for i in at:
            right[i] += weight * cell.log_ratio
            for j in at:
                matrix[i][j] += weight
    return dict(zip(names, _solve(matrix, right), strict=True))


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


def interval(profile: Profile, spec: ArchSpec, layout: Layout, device: Gpu) -> float:
    """Relative half-width that four in five steps of this kind should stay within.

    A profile that ``calibrate`` fitted says it itself; a prior is widened by what the layout uses
    that it was hardly compared with.
    """
    if profile.measurements:
        return profile.spread
    parts = [profile.spread]
    parts += [SPREAD_MOE] if spec.moe is not None else []
    parts += [SPREAD_OFFLOAD] if layout.offload != "none" else []
    parts += [SPREAD_FP8] if layout.dtype == "fp8" else []
    parts += [SPREAD_CPU] if device.architecture == "cpu" else []
    return min(WIDEST, math.hypot(*parts))


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
