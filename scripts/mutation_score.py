"""How many of the planted bugs of mutants.toml the emulator reports.

    python scripts/mutation_score.py [--only TEXT]    # exit 0 when all that are bugs are reported

Each mutant is compiled against the built emulator (``make test-emulate``, or any emulated test,
builds it), and its op runs on shapes that reach every path: rows over several blocks, a row longer
than a block's registers, odd columns, unaligned memory. What counts is a report: a bug that only
makes values wrong is not counted as found.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/emulate"
CUDA = ROOT / "cpp/src/cuda"
MODULE_FOLDER = BUILD / "cpp/emulator"


def load(library: Path) -> Any:
    spec = importlib.util.spec_from_file_location("_emulated", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Device:
    """Arrays of the emulated device; the second in a row is not aligned to 16 bytes if asked."""

    def __init__(self, core: Any) -> None:
        self.core = core

    def put(self, tensor: torch.Tensor, offset: int = 0) -> Any:
        array = self.empty(*tensor.shape, dtype=tensor.dtype, offset=offset)
        array.upload(tensor.contiguous().view(torch.uint8).numpy())
        return array

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Any:
        return self.core.DeviceArray(list(shape), str(dtype).removeprefix("torch."), offset)

    def random(self, *shape: int, offset: int = 0) -> Any:
        return self.put(torch.randn(*shape), offset)


SHAPES = ((9, 33), (11, 600), (40, 24), (3, 9000))


def run_rmsnorm(d: Device) -> None:
    for rows, cols in SHAPES:
        x, w, y, rstd = d.random(rows, cols), d.random(cols), d.empty(rows, cols), d.empty(rows)
        d.core.rmsnorm_fwd(x, None, w, y, None, rstd, 1e-6)
        parts = d.core.rmsnorm_bwd_parts(rows, cols, True)
        dx, dw, partial = d.empty(rows, cols), d.empty(cols), d.empty(parts, cols)
        given = d.put(torch.ones(rows))
        d.core.rmsnorm_bwd(d.random(rows, cols), x, w, given, None, dx, dw, partial)


def run_layernorm(d: Device) -> None:
    for rows, cols in SHAPES:
        x, w, b = d.random(rows, cols), d.random(cols), d.random(cols)
        y, mean, rstd = d.empty(rows, cols), d.empty(rows), d.empty(rows)
        d.core.layernorm_fwd(x, None, w, b, y, None, mean, rstd, 1e-5)
        parts = d.core.layernorm_bwd_parts(rows, cols, True)
        dx, dw, db = d.empty(rows, cols), d.empty(cols), d.empty(cols)
        partial = d.empty(2, parts, cols)
        given = d.put(torch.ones(rows))
        d.core.layernorm_bwd(d.random(rows, cols), x, w, given, given, None, dx, dw, db, partial)


def run_glu(d: Device) -> None:
    for count, offset in ((1000, 0), (1001, 0), (64, 1)):
        gate, up = d.random(count, offset=offset), d.random(count)
        d.core.glu_fwd(gate, up, d.empty(count), "silu")
        d.core.glu_bwd(d.random(count), gate, up, d.empty(count), d.empty(count), "gelu")


def run_bias_gelu(d: Device) -> None:
    for rows, cols in ((70, 24), (5, 33), (3, 1100)):
        x, b = d.random(rows, cols), d.random(cols)
        d.core.bias_gelu_fwd(x, b, d.empty(rows, cols))
        partial = d.empty(d.core.bias_gelu_bwd_parts(rows, cols, True), cols)
        dx, db = d.empty(rows, cols), d.empty(cols)
        d.core.bias_gelu_bwd(d.random(rows, cols), x, b, dx, db, partial)


def run_cross_entropy(d: Device) -> None:
    for rows, cols in ((9, 33), (3, 5000)):
        x = d.random(rows, cols)
        labels = torch.arange(rows) % cols
        labels[0] = cols + 100_000
        on_device = d.put(labels)
        d.core.cross_entropy_fwd(x, on_device, d.empty(rows), d.empty(rows), d.empty(rows))
        d.core.cross_entropy_loss(x, on_device, d.empty(rows), d.empty(rows))
        lse, dloss = d.random(rows), d.random(rows)
        d.core.cross_entropy_bwd(x, on_device, lse, dloss, d.empty(rows, cols))


def run_softmax(d: Device) -> None:
    for shape in ((2, 3, 5, 33), (1, 1, 3, 9000)):
        for causal in (False, True):
            x, y, dx = d.random(*shape), d.empty(*shape), d.empty(*shape)
            d.core.softmax_fwd(x, None, None, y, 1.0, causal)
            d.core.softmax_bwd(x, d.random(*shape), dx, 1.0, causal)


def run_grad_norm(d: Device) -> None:
    for count in (1001, 20003):
        d.core.squared_sum(d.random(count), d.empty(d.core.squared_sum_parts(count, True)))


def run_adamw(d: Device) -> None:
    for count in (1000, 1001):
        state = [d.random(count), d.random(count), d.put(torch.zeros(count))]
        state.append(d.put(torch.ones(count)))
        d.core.adamw(*state, None, None, 1e-3, 0.9, 0.99, 1e-8, 0.1, 1)


def run_moe_permute(d: Device) -> None:
    for cols in (33, 2000):
        slots = torch.arange(20).view(10, 2)
        slots[3, 1] = -1
        on_device, x, y = d.put(slots), d.random(10, cols), d.random(20, cols)
        d.core.moe_permute(on_device, x, d.empty(20, cols))
        d.core.moe_combine(on_device, None, y, d.empty(10, cols))
        w, dy, dw = d.random(10, 2), d.empty(20, cols), d.empty(10, 2)
        d.core.moe_combine_bwd(on_device, w, x, y, dy, dw)


RUNS = {name.removeprefix("run_"): f for name, f in list(globals().items()) if name[:4] == "run_"}


def run(library: Path, op: str) -> list[str]:
    """Kinds of what the emulator reports, in a process of its own: a mutant may crash it."""
    command = [sys.executable, __file__, "--run", op, "--library", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return []  # nor is a launch that never ends
    if done.returncode < 0:
        return []  # a signal, which is no report
    if done.returncode != 0:
        raise RuntimeError(f"{op} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    kinds: list[str] = json.loads(done.stdout)
    return kinds


def reports_of(library: Path, op: str) -> list[str]:
    core = load(library)
    kinds: set[str] = set()
    for schedule in (0, 1, 5):
        core.set_options(schedule=schedule)
        try:
            RUNS[op](Device(core))
        except RuntimeError:  # the launch was abandoned, of which there is a report
            if not core.reports():
                raise
        kinds |= {kind for kind, _, _ in core.reports()}
        core.clear_reports()
    return sorted(kinds)


def compile_mutant(mutant: dict[str, Any], folder: Path) -> Path:
    """The emulator's module with the mutant in place of what it changes."""
    sources = folder / "cuda"
    shutil.copytree(CUDA, sources)
    text = (sources / mutant["file"]).read_text()
    if text.count(mutant["find"]) != mutant.get("count", 1):
        found = text.count(mutant["find"])
        raise ValueError(f"{mutant['name']}: found {found} times in {mutant['file']}")
    (sources / mutant["file"]).write_text(text.replace(mutant["find"], mutant["replace"]))
    name = mutant["file"] if mutant["file"].endswith(".cpp") else f"{mutant['op']}.cu"
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    (entry,) = (c for c in commands if Path(c["file"]) == CUDA / name)
    command = shlex.split(entry["command"].replace("-Werror", ""))
    command[command.index("-o") + 1] = str(folder / "mutant.o")
    command[command.index("-c") + 1] = str(sources / name)
    subprocess.run(command, cwd=entry["directory"], check=True, capture_output=True)
    link = shlex.split((MODULE_FOLDER / "CMakeFiles/_emulated.dir/link.txt").read_text())
    library = folder / "_emulated.so"
    link[link.index("-o") + 1] = str(library)
    # Before the archive, whose own member is then not taken.
    link.insert(link.index("../libfastllm_ops.a"), str(folder / "mutant.o"))
    subprocess.run(link, cwd=MODULE_FOLDER, check=True, capture_output=True)
    return library


def score(mutants: list[dict[str, Any]]) -> int:
    missed = 0
    bugs = [m for m in mutants if "equivalent" not in m]
    for mutant in mutants:
        with tempfile.TemporaryDirectory() as folder:
            kinds = run(compile_mutant(mutant, Path(folder)), mutant["op"])
        if "equivalent" in mutant:
            verdict = f"FALSE REPORT {kinds}" if kinds else "clean, as it should be"
            missed += bool(kinds)
        else:
            verdict = ", ".join(kinds) if kinds else "NOT REPORTED"
            missed += not kinds
        print(f"{mutant['op']:14s}{mutant['name']:54s}{verdict}", flush=True)
    print(f"{len(bugs)} bugs, {len(mutants) - len(bugs)} equivalent mutants, {missed} misjudged")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(reports_of(arguments.library, arguments.run)))
        return 0
    built = list((BUILD / "python").glob("_emulated*.so"))
    if not built:
        print("error: the emulator is not built", file=sys.stderr)
        print("hint: make test-emulate", file=sys.stderr)
        return 2
    for op in RUNS:
        kinds = run(built[0], op)
        if kinds:
            print(f"error: {op} as it is is reported: {kinds}", file=sys.stderr)
            return 2
    mutants = tomllib.loads((ROOT / "scripts/mutants.toml").read_text())["mutant"]
    return score([m for m in mutants if arguments.only in m["name"]])


if __name__ == "__main__":
    sys.exit(main())
