"""Other predictors on the same rows, each series left out whole: what validate has to beat.

    python benchmarks/planner/baselines.py ../shared/data/published_runs.csv

- ``50 % MFU``: model FLOPs at half the datasheet peak.
- ``MFU of the GPU``: median MFU of the other series on that GPU (of all others if there are none).
- ``regression``: log(time at the datasheet peak) corrected by ridge regression on size, sequence,
  micro-batch, parallel sizes, bubble, recomputation, attention kernel, GPU and stack. Needs numpy.
- ``model without profiles``: this planner with no fitted factor at all.
- ``model``: what ``fastllm-planner validate`` prints.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from fastllm_planner.flops import hardware_flops_per_token, model_flops_per_token
from fastllm_planner.steptime import estimate_step
from fastllm_planner.validate import NEUTRAL, errors, predict
from fastllm_planner.validate_rows import Row, read_rows

Predictor = Callable[[Sequence[Row], Sequence[Row]], list[float]]


def peak(row: Row) -> float:
    """FLOP/s of the datasheet, dense, bf16 (fp16 where there is none)."""
    device = row.cluster.gpu
    return device.peak("bf16" if device.supports("bf16") else "fp16") * 1e12


def seconds_at_peak(row: Row) -> float:
    tokens = row.layout.global_batch * row.layout.seq_len / row.layout.world_size
    return model_flops_per_token(row.spec, row.layout.seq_len) * tokens / peak(row)


def half_peak(_: Sequence[Row], test: Sequence[Row]) -> list[float]:
    return [2 * seconds_at_peak(row) for row in test]


def gpu_median(train: Sequence[Row], test: Sequence[Row]) -> list[float]:
    def inverse_mfu(rows: Sequence[Row]) -> float:
        return median((row.seconds or 0.0) / seconds_at_peak(row) for row in rows)

    result: list[float] = []
    for row in test:
        same = [r for r in train if r.cluster.gpu.name == row.cluster.gpu.name]
        result.append(inverse_mfu(same or train) * seconds_at_peak(row))
    return result


def features(row: Row, gpus: list[str], stacks: list[str]) -> list[float]:
    layout = row.layout
    hardware = hardware_flops_per_token(row.spec, layout.seq_len, layout.recompute)
    bubble = (layout.pp - 1) / (layout.micro_batches * layout.virtual_stages)
    numbers = [
        1.0,
        math.log(row.spec.hidden / 4096),
        math.log(layout.seq_len / 2048),
        math.log(layout.micro_batch * layout.seq_len / 4096),
        math.log(hardware / model_flops_per_token(row.spec, layout.seq_len)),
        math.log2(layout.tp),
        math.log1p(bubble),
        math.log2(row.cluster.nodes),
        float(not layout.flash),
        float(layout.dtype == "fp8"),
        float(layout.zero_stage == 3),
    ]
    numbers += [float(row.cluster.gpu.name == name) for name in gpus]
    return numbers + [float(row.backend.name == name) for name in stacks]


def regression(train: Sequence[Row], test: Sequence[Row]) -> list[float]:
    gpus = sorted({r.cluster.gpu.name for r in train})
    stacks = sorted({r.backend.name for r in train})
    series = {name: sum(r.series == name for r in train) for name in {r.series for r in train}}
    x = np.array([features(r, gpus, stacks) for r in train])
    y = np.array([math.log((r.seconds or 1.0) / seconds_at_peak(r)) for r in train])
    weight = np.array([1 / math.sqrt(series[r.series]) for r in train])
    penalty = np.eye(x.shape[1]) * 0.3
    penalty[0, 0] = 0.0
    solution = np.linalg.solve(x.T @ (x * weight[:, None]) + penalty, x.T @ (y * weight))
    return [
        math.exp(float(np.array(features(r, gpus, stacks)) @ solution)) * seconds_at_peak(r)
        for r in test
    ]


def bare_model(_: Sequence[Row], test: Sequence[Row]) -> list[float]:
    return [estimate_step(r.spec, r.layout, r.cluster, r.backend, NEUTRAL).total for r in test]


def main() -> None:
    table = read_rows(Path(sys.argv[1]))[0]
    rows = [row for row in table if row.complete and row.seconds]
    names = list(dict.fromkeys(row.series for row in rows))
    predictors: dict[str, Predictor] = {
        "50 % MFU": half_peak,
        "MFU of the GPU": gpu_median,
        "regression": regression,
        "model without profiles": bare_model,
        "model": lambda train, test: [p.seconds for p in predict([*train, *test], test[0].series)],
    }
    print("| predictor | MAPE % | median % | within 10 % | within 20 % |")
    print("|---|---|---|---|---|")
    for name, predictor in predictors.items():
        found: list[float] = []
        for series in names:
            train = [row for row in rows if row.series != series]
            test = [row for row in rows if row.series == series]
            pairs = zip(predictor(train, test), test, strict=True)
            found += [value / (row.seconds or 1.0) - 1 for value, row in pairs]
        e = errors(found)
        shares = f"{100 * e.within_10:.0f} | {100 * e.within_20:.0f}"
        print(f"| {name} | {100 * e.mape:.1f} | {100 * e.median:.1f} | {shares} |")


if __name__ == "__main__":
    main()
