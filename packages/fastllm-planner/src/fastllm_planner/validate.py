"""Predictions against published runs: every series is predicted by profiles fitted without it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from fastllm_planner.backends import backend, backend_names
from fastllm_planner.efficiency import Cell, Effects, fit_effects, shipped_cells
from fastllm_planner.layout import check_layout
from fastllm_planner.memory import MemoryEstimate, estimate_memory
from fastllm_planner.profile import Profile
from fastllm_planner.steptime import estimate_step
from fastllm_planner.validate_rows import Row

NEUTRAL = Profile()
MIN_GROUP = 3


@dataclass(frozen=True)
class Prediction:
    """One row: measured and predicted seconds and bytes (None where nothing was measured).

    ``low`` and ``high`` bound ``seconds``; ``rules``: what ``check_layout`` has against the layout.
    """

    row: Row
    seconds: float
    low: float
    high: float
    memory_bytes: float
    fits: bool
    rules: tuple[str, ...]

    @property
    def inside_interval(self) -> bool | None:
        measured = self.row.seconds
        return None if measured is None else self.low <= measured <= self.high

    @property
    def time_error(self) -> float | None:
        """(predicted − measured) / measured."""
        measured = self.row.seconds
        return None if measured is None else self.seconds / measured - 1.0

    @property
    def memory_error(self) -> float | None:
        measured = self.row.memory_bytes
        return None if measured is None else self.memory_bytes / measured - 1.0


@dataclass(frozen=True)
class Errors:
    """Absolute relative errors of one quantity over some rows."""

    rows: int
    mape: float
    median: float
    bias: float
    within_10: float
    within_20: float


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on the runs that failed for want of memory, and on those that ran.

    ``ran_forbidden``: runs that a rule of ``check_layout`` calls impossible.
    """

    oom_rows: int
    oom_rejected: int
    ran_rows: int
    ran_rejected: int
    ran_forbidden: int


@dataclass(frozen=True)
class Group:
    """Layouts of one model on one cluster, ranked. ``regret``: slower than the best by."""

    series: str
    model: str
    gpus: int
    layouts: int
    kendall_tau: float
    regret: float


@dataclass(frozen=True)
class Report:
    """Everything ``validate`` prints."""

    predictions: tuple[Prediction, ...]
    time: dict[str, Errors]
    memory: dict[str, Errors]
    verdicts: dict[str, Verdicts]
    groups: tuple[Group, ...]


def cells_of(rows: Iterable[Row]) -> list[Cell]:
    """What each series says about each (device, backend): see ``efficiency``."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.seconds is None or not row.complete:
            continue
        plain = estimate_step(row.spec, row.layout, row.cluster, row.backend, NEUTRAL).total
        key = (row.series, row.cluster.gpu.name, row.backend.name)
        ratios.setdefault(key, []).append(math.log(row.seconds / plain))
    return [Cell(*key, len(values), median(values)) for key, values in ratios.items()]


def predict(rows: Sequence[Row], held_out: str | None = None) -> list[Prediction]:
    """Predict every row with profiles fitted on other series only.

    A series' own cells, from the rows given or shipped, never enter its profile. ``held_out``:
    score only that series.
    """
    own = cells_of(rows)
    named = {cell.series for cell in own}
    cells = [*own, *(cell for cell in shipped_cells() if cell.series not in named)]
    effects: dict[str, Effects] = {}
    predictions: list[Prediction] = []
    for row in rows:
        if held_out is not None and row.series != held_out:
            continue
        if row.series not in effects:
            effects[row.series] = fit_effects(c for c in cells if c.series != row.series)
        profile = effects[row.series].profile(row.cluster.gpu.name, row.backend.name)
        predictions.append(_predict_row(row, profile))
    return predictions


def _predict_row(row: Row, profile: Profile) -> Prediction:
    step = estimate_step(row.spec, row.layout, row.cluster, row.backend, profile)
    memory = estimate_memory(row.spec, row.layout, row.cluster, row.backend)
    stages = memory.stages[:1] if row.memory_of_rank_0 else memory.stages
    if row.memory_kind == "allocated":
        counted = max(stage.allocated for stage in stages)
    elif row.memory_kind == "reserved":
        counted = max(stage.allocated + stage.fragmentation for stage in stages)
    else:
        counted = max(stage.total for stage in stages[: _stages_of_first_node(row)])
    rules = check_layout(row.spec, row.layout, row.cluster, row.backend, tp_across_nodes=True)
    verdict = _fits(row, memory)
    return Prediction(row, step.total, step.low, step.high, counted, verdict, tuple(rules))


def _fits(row: Row, memory: MemoryEstimate) -> bool:
    """The verdict. Of a stack that only its behaviour told, the leanest of its family decides: what
    an unknown program keeps in memory is no reason to call a run impossible."""
    if row.backend_named or memory.fits(row.cluster):
        return memory.fits(row.cluster)
    related = [backend(name) for name in backend_names()]
    return any(
        estimate_memory(row.spec, row.layout, row.cluster, stack).fits(row.cluster)
        for stack in related
        if stack.family == row.backend.family
    )


def _stages_of_first_node(row: Row) -> int:
    """Pipeline stages whose ranks are on the first node.

    nvidia-smi shows one node, and logs print rank 0's: a table that says no more is taken to mean
    that node (stages are the outermost axis of the rank order in Megatron and DeepSpeed).
    """
    ranks_per_stage = row.layout.world_size // row.layout.pp
    return max(1, min(row.layout.pp, row.cluster.gpus_per_node // ranks_per_stage))


def errors(values: Sequence[float]) -> Errors:
    """Summary of signed relative errors (at least one)."""
    absolute = [abs(value) for value in values]
    count = len(values)
    return Errors(
        rows=count,
        mape=sum(absolute) / count,
        median=median(absolute),
        bias=median(values),
        within_10=sum(a <= 0.10 for a in absolute) / count,
        within_20=sum(a <= 0.20 for a in absolute) / count,
    )


def kendall_tau(measured: Sequence[float], predicted: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings; 0 if either is constant."""
    concordant = discordant = tied_m = tied_p = 0
    for i in range(len(measured)):
        for j in range(i):
            dm, dp = measured[i] - measured[j], predicted[i] - predicted[j]
            if dm == 0 and dp == 0:
                continue
            if dm == 0:
                tied_m += 1
            elif dp == 0:
                tied_p += 1
            elif (dm > 0) == (dp > 0):
                concordant += 1
            else:
                discordant += 1
    pairs = concordant + discordant
    scale = math.sqrt((pairs + tied_m) * (pairs + tied_p))
    return (concordant - discordant) / scale if scale else 0.0


def rank_groups(predictions: Sequence[Prediction]) -> list[Group]:
    """Groups of at least three layouts of one model on one cluster, with one batch and sequence.

    Repeated measurements of one layout are averaged first.
    """
    found: dict[tuple[object, ...], dict[object, list[Prediction]]] = {}
    for p in predictions:
        row = p.row
        if row.seconds is None:
            continue
        layout = row.layout
        key = (row.series, row.spec, row.cluster, row.backend.name, layout.dtype, layout.seq_len)
        found.setdefault((*key, layout.global_batch), {}).setdefault(layout, []).append(p)
    groups: list[Group] = []
    for layouts in found.values():
        if len(layouts) < MIN_GROUP:
            continue
        measured = [sum(p.row.seconds or 0.0 for p in ps) / len(ps) for ps in layouts.values()]
        predicted = [ps[0].seconds for ps in layouts.values()]
        chosen = min(range(len(predicted)), key=predicted.__getitem__)
        first = next(iter(layouts.values()))[0].row
        tau = kendall_tau(measured, predicted)
        regret = measured[chosen] / min(measured) - 1.0
        count = first.cluster.n_gpus
        groups.append(Group(first.series, first.model, count, len(layouts), tau, regret))
    return groups


def report(rows: Sequence[Row], held_out: str | None = None) -> Report:
    """Predict and score the complete rows. Rows that are not complete are left out."""
    complete = [row for row in rows if row.complete]
    predictions = predict(complete, held_out)
    return Report(
        predictions=tuple(predictions),
        time=_by_series([(p.row.series, p.time_error) for p in predictions]),
        memory=_by_series(
            [(f"{p.row.series} ({p.row.memory_kind})", p.memory_error) for p in predictions]
        ),
        verdicts=_verdicts(predictions),
        groups=tuple(rank_groups(predictions)),
    )


def _by_series(values: Sequence[tuple[str, float | None]]) -> dict[str, Errors]:
    """Errors by series and, under ``all``, of every row."""
    series: dict[str, list[float]] = {}
    for name, value in values:
        if value is not None:
            series.setdefault(name, []).append(value)
    result = {name: errors(found) for name, found in series.items()}
    everything = [value for found in series.values() for value in found]
    if everything:
        result["all"] = errors(everything)
    return result


def _verdicts(predictions: Sequence[Prediction]) -> dict[str, Verdicts]:
    result: dict[str, Verdicts] = {}
    for series in [*dict.fromkeys(p.row.series for p in predictions), "all"]:
        rows = [p for p in predictions if series in ("all", p.row.series)]
        failed = [p for p in rows if p.row.out_of_memory]
        ran = [p for p in rows if not p.row.out_of_memory]
        result[series] = Verdicts(
            oom_rows=len(failed),
            oom_rejected=sum(not p.fits for p in failed),
            ran_rows=len(ran),
            ran_rejected=sum(not p.fits for p in ran),
            ran_forbidden=sum(bool(p.rules) for p in ran),
        )
    return result
