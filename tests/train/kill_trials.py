"""A run killed with SIGKILL at random moments, again and again: no checkpoint may be lost.

    python tests/train/kill_trials.py MODE KILLS [SEED]

MODE is one of MODES. Two processes train and save after every step; after a while a random one of
them, or both at once, gets SIGKILL (some while they still start or resume), and what is left of the
job follows. Then the newest checkpoint must be whole, none newer broken, and not older than what
``latest`` named before. At last the run goes on to its end and must equal one that was never
killed: every loss, every weight, to the bit. Prints a JSON object; exits 1 at the first loss.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kill_worker
import rank_job
from train_layouts import ADAMW, tiny_config

from fastllm_train.checkpoint import SAVING, newest, step_of
from fastllm_train.config import to_table

TORCH: dict[str, dict[str, Any]] = {
    "speed": {"engine": "torch"},
    "checkpoint": {"format": "portable"},
    "precision": {"dtype": "bf16"},
}
MODES: dict[str, dict[str, dict[str, Any]]] = {
    "torch": {**TORCH, "parallel": {"dp": 2}},
    "torch-zero": {**TORCH, "parallel": {"dp": 2, "zero_stage": 1}},
    "torch-pp": {**TORCH, "parallel": {"pp": 2}, "precision": {"dtype": "fp32"}},
    "torch-background": {
        **TORCH,
        "parallel": {"tp": 2},
        "checkpoint": {"format": "portable", "background": True},
    },
    # DeepSpeed's engine
    "deepspeed": {"parallel": {"dp": 2, "zero_stage": 1}, "checkpoint": {"format": "deepspeed"}},
    "portable": {"parallel": {"pp": 2, "zero_stage": 1}, "checkpoint": {"format": "portable"}},
    "background": {
        "parallel": {"dp": 2, "zero_stage": 2},
        "checkpoint": {"format": "portable", "background": True},
    },
}
ENDLESS = 1_000_000
RANKS = 2
STARTS_S = 1.0  # about what a run takes until its first step
RUNS_S = 0.4
HANGS_S = 300.0


class Lost(Exception):
    """A checkpoint is not what it must be."""


def table_of(mode: str, out: Path, steps: int, every: int) -> dict[str, Any]:
    sections = MODES[mode]
    config = tiny_config(
        **{**sections, "checkpoint": {**sections["checkpoint"], "every": every}},
        optim=ADAMW,
        schedule={"kind": "constant", "steps": steps},
        run={"out": str(out)},
    )
    return to_table(config)


def start(folder: Path, table: dict[str, Any]) -> dict[int, int]:
    listing = folder / "config.json"
    listing.write_text(json.dumps(table))
    return rank_job.fork_ranks((RANKS, [kill_worker.__file__, str(listing)]), folder)


def finish(folder: Path, mode: str, out: Path, steps: int) -> None:
    """Train to the end, undisturbed."""
    table = table_of(mode, out, steps, every=0)
    (folder / "config.json").write_text(json.dumps(table))
    rank_job.run_job((RANKS, [kill_worker.__file__, str(folder / "config.json")]), folder)


def losses(out: Path) -> dict[int, float]:
    """By step, the last time it was taken."""
    found: dict[int, float] = {}
    if (out / "metrics.jsonl").exists():
        for line in (out / "metrics.jsonl").read_text().splitlines(keepends=True):
            if line.endswith("}\n"):
                record = json.loads(line)
                if record["kind"] == "step":
                    found[record["step"]] = record["loss"]
    return found


def tensors_of(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of either format, by file and path in it."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(f"{name}/{key}", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(f"{name}/{index}", item)

    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors":
            walk(file.name, load_file(file))
        elif file.suffix == ".pt":  # written by this script's runs
            walk(file.name, torch.load(file, weights_only=False))
    return found


def announced(out: Path) -> int:
    """The step that ``latest`` names; 0: none yet."""
    latest = out / "checkpoints/latest"
    return step_of(latest.read_text().strip()) or 0 if latest.exists() else 0


def kill_once(folder: Path, out: Path, mode: str, draw: random.Random) -> dict[str, Any]:
    """Start or resume, kill at a random moment; what was going on then."""
    before = newest(out / "checkpoints").step
    steps = len(losses(out))
    ranks = start(folder, table_of(mode, out, ENDLESS, every=1))
    moment = time.monotonic()
    early = draw.random() < 0.2  # while it starts or resumes
    while not early and len(losses(out)) <= steps:
        ended, _ = os.waitpid(-1, os.WNOHANG)
        if ended or time.monotonic() - moment > HANGS_S:
            raise Lost("the run did not go on:\n" + (folder / str(ranks.get(ended, 0))).read_text())
        time.sleep(0.002)
    time.sleep(draw.uniform(0.0, STARTS_S if early else RUNS_S))
    pids = list(ranks)
    victims = draw.choice(([pids[0]], [pids[1]], pids))
    saving = (out / "checkpoints" / SAVING).exists()
    before = max(before, announced(out))
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    time.sleep(draw.uniform(0.0, 0.1))  # the others go on, or wait for the dead, a little
    for pid in set(pids) - set(victims):  # it may have ended: the connection to the dead broke
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    found = newest(out / "checkpoints")
    if found.rejected or found.step < before:
        raise Lost(f"there was one of step {before}, now: {found}")
    return {"early": early, "saving": saving, "step": found.step}


def trials(mode: str, count: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, straight = folder / "killed", folder / "straight"
        kills = [kill_once(folder, out, mode, draw) for _ in range(count)]
        steps = newest(out / "checkpoints").step + 3
        finish(folder, mode, out, steps)
        finish(folder, mode, straight, steps)
        if losses(out) != losses(straight):
            raise Lost("the losses are not those of a run that was never killed")
        ends = [newest(at / "checkpoints").path for at in (out, straight)]
        got, want = (tensors_of(end) for end in ends if end is not None)
        different = [key for key in want if not got[key].equal(want[key])]
        if different or got.keys() != want.keys():
            raise Lost(f"the state differs in {different[:5]}")
    return {
        "mode": mode,
        "kills": count,
        "while starting": sum(kill["early"] for kill in kills),
        "while saving": sum(kill["saving"] for kill in kills),
        "steps": steps,
    }


def main() -> None:
    rank_job.import_for_ranks()
    mode, count, *seed = sys.argv[1:]
    print(json.dumps(trials(mode, int(count), int(seed[0]) if seed else 1)), flush=True)


if __name__ == "__main__":
    main()
