"""Efficiency factors of one (GPU, backend), as data: what ``calibrate`` fits and ``plan`` uses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastllm_planner.errors import UserError

SCHEMA = 1


@dataclass(frozen=True)
class Profile:
    """Factors on predicted times: above 1 is slower than the prior says.

    ``compute`` multiplies everything the device computes, ``communication`` every collective.
    ``spread`` is the relative half-width of the interval around a prediction (one in five
    measurements falls outside).
    """

    gpu: str = ""
    backend: str = ""
    compute: float = 1.0
    communication: float = 1.0
    spread: float = 0.20
    measurements: int = 0


@dataclass(frozen=True)
class Measurement:
    """One measured step: seconds, and a function that predicts them under a profile."""

    seconds: float
    predict: Callable[[Profile], float]
    weight: float = 1.0


# Prior widths (log) of compute and communication: how far a factor may stray before it needs
# evidence. Compute differs between stacks by tens of percent (MFU by stack), links by more.
PRIOR_WIDTHS = (0.25, 0.35)
# Log error of one measurement that counts as ordinary; beyond it, errors count linearly.
NOISE = 0.08


def fit_profile(measurements: Sequence[Measurement], start: Profile | None = None) -> Profile:
    """The profile that explains the measurements best; factors without evidence stay at ``start``.

    Minimises robust log errors plus the prior by coordinate search, which needs no dependency.
    """
    base = start or Profile()
    kept = [m for m in measurements if m.seconds > 0]
    if not kept:
        return base
    factors, best = [0.0, 0.0], _loss(kept, base, [0.0, 0.0])
    step = 0.2
    while step > 0.002:
        improved = False
        for index in range(len(factors)):
            for sign in (1.0, -1.0):
                trial = list(factors)
                trial[index] += sign * step
                loss = _loss(kept, base, trial)
                if loss < best - 1e-9:
                    factors, best, improved = trial, loss, True
        if not improved:
            step /= 2
    profile = _scaled(base, factors)
    errors = sorted(abs(_log_error(m, profile)) for m in kept)
    spread = max(0.03, errors[min(len(errors) - 1, int(0.8 * len(errors)))])
    return replace(profile, spread=spread, measurements=len(kept))


def _scaled(base: Profile, log_factors: Sequence[float]) -> Profile:
    compute, communication = (math.exp(value) for value in log_factors)
    return replace(
        base,
        compute=base.compute * compute,
        communication=base.communication * communication,
    )


def _log_error(m: Measurement, profile: Profile) -> float:
    return math.log(max(m.predict(profile), 1e-12) / m.seconds)


def _loss(kept: Sequence[Measurement], base: Profile, log_factors: Sequence[float]) -> float:
    profile = _scaled(base, log_factors)
    total = 0.0
    for m in kept:
        error = _log_error(m, profile) / NOISE
        total += m.weight * (math.sqrt(1.0 + error * error) - 1.0)
    for value, width in zip(log_factors, PRIOR_WIDTHS, strict=True):
        total += 0.5 * (value / width) ** 2
    return total


def save_profile(profile: Profile) -> str:
    """JSON text of a profile."""
    return json.dumps({"schema": SCHEMA, **asdict(profile)}, indent=2) + "\n"


def load_profile(path: Path) -> Profile:
    """A profile that ``calibrate`` wrote. ``UserError`` for anything else."""
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:  # pyright: ignore
        raise UserError(f"{path} is not a profile of this version", hint="run calibrate again")
    return _profile_from(raw, path)  # pyright: ignore[reportUnknownArgumentType]


def _profile_from(raw: dict[str, Any], path: Path) -> Profile:
    values = {key: value for key, value in raw.items() if key != "schema"}
    try:
        profile = Profile(**values)
        finite = all(
            math.isfinite(x) and x > 0
            for x in (profile.compute, profile.communication, profile.spread)
        )
    except TypeError as error:
        raise UserError(f"{path}: not a profile ({error})") from error
    if not finite:
        raise UserError(f"{path}: factors must be positive numbers")
    return profile
