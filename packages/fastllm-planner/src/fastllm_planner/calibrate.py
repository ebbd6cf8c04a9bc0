"""From a run's ``metrics.jsonl`` to a profile of this cluster.

Each run segment (a ``run`` line and the steps that follow it) gives one measurement: the median
step, without the warm-up. The fit itself is ``fastllm_planner.profile.fit_profile``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastllm_planner.arch import ArchError, ArchSpec, spec_from_dict
from fastllm_planner.arch.spec import as_table, is_number
from fastllm_planner.backends import Backend
from fastllm_planner.efficiency import default_profile
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import Cluster, gpu
from fastllm_planner.layout import Layout
from fastllm_planner.profile import Measurement, Profile, fit_profile
from fastllm_planner.steptime import step_seconds

# The first steps of a (re)start compile, allocate and fill caches.
WARM_UP_STEPS = 3
MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Segment:
    """One (re)start of a run: what it ran, and the seconds of each step after the warm-up."""

    spec: ArchSpec
    layout: Layout
    device: str
    devices: int
    step_seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Calibration:
    """The fitted profile, and each segment's (measured, before, after) seconds."""

    profile: Profile
    rows: tuple[tuple[Segment, float, float, float], ...]


def read_segments(path: Path, note: Callable[[str], None] = lambda _: None) -> list[Segment]:
    """The segments of a metrics file that have steps left after the warm-up.

    A last line that a killed run left unfinished is ignored; ``note`` is told.
    """
    try:
        with path.open(encoding="utf-8", errors="strict") as lines:
            return list(_segments(path, lines, note))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: {error.reason}") from error


def _segments(path: Path, lines: Iterable[str], note: Callable[[str], None]) -> Iterable[Segment]:
    run: tuple[ArchSpec, Layout, str, int] | None = None
    seconds: list[float] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if number > 1 and _is_cut(line):
            note(f"{where}: the last line is cut and ignored")
            break
        record = _record(where, line)
        kind = record.get("kind")
        if kind == "run":
            if run and len(seconds) > WARM_UP_STEPS:
                yield Segment(*run, tuple(seconds[WARM_UP_STEPS:]))
            run, seconds = _run(where, record), []
        elif kind == "step":
            if run is None:
                raise UserError(f"{where}: a step before any run line")
            seconds.append(_positive(where, record, "step_time_s"))
    if run and len(seconds) > WARM_UP_STEPS:
        yield Segment(*run, tuple(seconds[WARM_UP_STEPS:]))


def _is_cut(line: str) -> bool:
    """Whether a line without its end is no JSON: a writer was stopped in it."""
    if line.endswith("\n") or len(line) > MAX_LINE_BYTES:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _record(where: str, line: str) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{where}: a line of {len(line)} characters is no metrics record")
    try:
        record = as_table(json.loads(line))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if record is None:
        raise UserError(f"{where} is not a JSON object")
    return record


def _positive(where: str, record: dict[str, Any], key: str) -> float:
    value = record.get(key)
    if not is_number(value) or value <= 0:
        raise UserError(f"{where}: {key}={value!r} is not a positive number")
    return float(value)


def _run(where: str, record: dict[str, Any]) -> tuple[ArchSpec, Layout, str, int]:
    if record.get("schema") != 1:
        raise UserError(f"{where}: metrics schema {record.get('schema')!r} is unknown", "needs 1")
    tables = {key: as_table(record.get(key)) for key in ("arch", "parallel", "batch")}
    arch, parallel, batch = (tables[key] for key in ("arch", "parallel", "batch"))
    if arch is None or parallel is None or batch is None:
        absent = ", ".join(key for key, table in tables.items() if table is None)
        raise UserError(f"{where}: the run line has no {absent}")
    try:
        spec = spec_from_dict(arch)
    except ArchError as error:
        raise UserError(f"{where}: {error}", error.hint) from error
    layout = _layout(where, parallel, batch, str(record.get("dtype", "bf16")))
    return spec, layout, str(record.get("device", "")), layout.world_size


def _layout(where: str, parallel: dict[str, Any], batch: dict[str, Any], dtype: str) -> Layout:
    zero = parallel.get("zero_stage", 1)
    recompute, offload = parallel.get("recompute", "none"), parallel.get("offload", "none")
    if (
        zero not in (0, 1, 2, 3)
        or recompute not in ("none", "selective", "full")
        or offload not in ("none", "optimizer", "optimizer+params")
        or dtype not in ("fp32", "bf16", "fp16", "fp8")
    ):
        raise UserError(f"{where}: zero_stage, recompute, offload or dtype is unknown")
    return Layout(
        dp=_size(where, parallel, "dp"),
        tp=_size(where, parallel, "tp"),
        pp=_size(where, parallel, "pp"),
        cp=_size(where, parallel, "cp"),
        ep=_size(where, parallel, "ep"),
        virtual_stages=_size(where, parallel, "virtual_stages"),
        zero_stage=zero,
        recompute=recompute,
        offload=offload,
        sequence_parallel=parallel.get("sequence_parallel") is True,
        micro_batch=_size(where, batch, "micro"),
        global_batch=_size(where, batch, "global"),
        seq_len=_size(where, batch, "seq_len"),
        dtype=dtype,
    )


def _size(where: str, table: dict[str, Any], key: str) -> int:
    value = table.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**32:
        raise UserError(f"{where}: {key}={value!r} is not a positive integer")
    return value


def calibrate(
    segments: Sequence[Segment], device: str, gpus_per_node: int, backend: Backend
) -> Calibration:
    """Fit a profile of ``device`` under ``backend`` to the segments' median steps."""
    if not segments:
        raise UserError(
            f"no run has more than {WARM_UP_STEPS} steps: nothing to fit",
            "the first steps of a run are warm-up and do not count",
        )
    base = gpu(device)
    start = replace(default_profile(base.name, backend.name), gpu=base.name, backend=backend.name)

    def predict(segment: Segment, profile: Profile) -> float:
        per_node = segment.devices if base.architecture == "cpu" else gpus_per_node
        cluster = Cluster(base, segment.devices, min(per_node, segment.devices))
        return step_seconds(segment.spec, segment.layout, cluster, backend, profile)

    def measurement(segment: Segment) -> Measurement:
        return Measurement(segment.median, lambda profile: predict(segment, profile))

    fitted = fit_profile([measurement(segment) for segment in segments], start)
    # A fit to a few points reproduces them; that says little about the next layout.
    floor = 0.10 if len(segments) < 3 else 0.05
    profile = replace(fitted, spread=max(fitted.spread, floor))
    rows = tuple((s, s.median, predict(s, start), predict(s, profile)) for s in segments)
    return Calibration(profile, rows)
