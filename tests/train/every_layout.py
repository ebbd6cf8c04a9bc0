"""Every layout of SIZE processes that is not refused, against one process: too many for each run of
the tests.

    python tests/train/every_layout.py fp64|fp32|bf16 SIZE [FAMILY …] [--engine torch]

fp64: loss and every gradient through DeepSpeed, to 1e-12. fp32: five steps of SGD and of AdamW,
clipping that acts, as ``test_layout_training``. bf16: twenty steps. These two run either engine,
DeepSpeed's unless ``--engine`` says so. Layouts are all products of dp,
tp (with and without sequence parallelism), pp, cp, ep and the ZeRO stages; the recomputation takes
turns. Prints a JSON object with the largest errors; exits 1 when a layout is off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from test_layout_training import BF16
from test_zero_gradients import run_double
from train_layouts import (
    ADAMW,
    FAMILIES,
    Trajectory,
    assert_same_bf16_training,
    assert_same_training,
    reference,
    tiny_arch,
    tiny_config,
)
from train_worker import run_layouts

from fastllm_train.config import Config
from fastllm_train.errors import UserError
from fastllm_train.refusals import refuse

RECOMPUTE = ("none", "selective", "full")
GLOBAL = 4
JOB = 30
T = TypeVar("T")
OPTIMIZERS: dict[str, dict[str, Any]] = {"sgd": {}, "adamw": ADAMW}


def config_of(family: str, parallel: dict[str, Any], **sections: Any) -> Config:
    arch = tiny_arch(family, layers=max(2, parallel.get("pp", 1)))
    batch = {"micro": 1, "global": GLOBAL}
    return tiny_config(model={"arch": arch}, parallel=parallel, batch=batch, **sections)


def layouts(family: str, size: int, engine: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name → [parallel], of what ``engine`` trains."""
    sizes = [n for n in range(1, size + 1) if size % n == 0]
    turns = itertools.cycle(RECOMPUTE)
    for dp, tp, pp, cp, ep in itertools.product(sizes, repeat=5):
        if dp * tp * pp * cp != size:
            continue
        for sp, stage in itertools.product((False, True), range(4)):
            found = {"dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep}
            shown = " ".join(f"{axis}{n}" for axis, n in found.items() if n > 1)
            parallel = {**found, "sequence_parallel": sp, "zero_stage": stage}
            try:
                config = config_of(family, parallel, speed={"engine": engine})
                refuse(config, config.model.resolve())
            except UserError:
                continue
            recompute = next(turns)
            name = f"{family}: {shown}{' sp' * sp} zero{stage} {recompute}"
            yield name, {**parallel, "recompute": recompute}


def in_jobs(
    run: Callable[[dict[str, Any], Path], dict[str, T]], all_of: dict[str, Any]
) -> dict[str, T]:
    """A job has a time limit: ``JOB`` layouts in each."""
    found: dict[str, T] = {}
    names = list(all_of)
    for first in range(0, len(names), JOB):
        with tempfile.TemporaryDirectory() as folder:
            part = {name: all_of[name] for name in names[first : first + JOB]}
            found |= run(part, Path(folder))
    return found


def double(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Largest relative error of each layout."""
    errors = in_jobs(run_double, found)
    return {name: max(error.values()) for name, error in errors.items()}


def trained(found: dict[str, dict[str, Any]], precision: str, engine: str) -> dict[str, float]:
    """Largest difference of a loss; infinite where anything compared is off."""
    twenty = {"schedule": {"kind": "constant", "steps": 20}}
    more: dict[str, Any] = {} if precision == "fp32" else {**BF16, **twenty}
    more["speed"] = {"engine": engine}
    optimizers = OPTIMIZERS if precision == "fp32" else {"adamw": more["optim"]}
    configs = {
        f"{name} {optimizer}": config_of(name.split(":")[0], layout, **{**more, "optim": optim})
        for name, layout in found.items()
        for optimizer, optim in optimizers.items()
    }
    trajectories = in_jobs(run_layouts, configs)
    wanted: dict[tuple[Any, ...], Trajectory] = {}
    errors: dict[str, float] = {}
    for name, got in trajectories.items():
        config = configs[name]
        key = (name.split(":")[0], config.model.resolve().layers, config.optim)
        if key not in wanted:
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            wanted[key] = reference(config, dtype=dtype)
        want = wanted[key]
        pairs = zip(got.losses, want.losses, strict=True)
        errors[name] = max(abs(one - other) for one, other in pairs)
        same = assert_same_training if precision == "fp32" else assert_same_bf16_training
        try:
            same(got, want)
        except AssertionError as error:
            print(f"{name}: {error}", file=sys.stderr)
            errors[name] = float("inf")
    return errors


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("precision", choices=("fp64", "fp32", "bf16"))
    parser.add_argument("size", type=int)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--engine", choices=("torch", "deepspeed"), default="deepspeed")
    asked = parser.parse_args()
    if asked.precision == "fp64" and asked.engine == "torch":
        parser.error("fp64 goes through DeepSpeed; test_layout_gradients has the model's gradients")
    precision, size, engine = asked.precision, asked.size, asked.engine
    found = {
        name: layout
        for family in asked.families or FAMILIES
        for name, layout in layouts(family, size, engine)
    }
    errors = double(found) if precision == "fp64" else trained(found, precision, engine)
    worst = max(errors, key=lambda name: errors[name])
    shown = {"precision": precision, "engine": engine, "processes": size, "layouts": len(found)}
    print(json.dumps({**shown, "runs": len(errors), "worst": worst, "error": errors[worst]}))
    return int(errors[worst] > (1e-12 if precision == "fp64" else 5e-3))


if __name__ == "__main__":
    sys.exit(main())
