"""How many of the planted bugs of mutants.toml the emulator reports.

    python scripts/mutation_score.py [--only TEXT]    # exit 0 when all that are bugs are reported

Each mutant is compiled against the built emulator (any emulated test of tests/ops builds it), and
its op runs on the shapes of mutation_runs.py. What counts is a report: a bug that only makes values
wrong is not counted as found, nor is a launch that never ends.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from mutation_runs import RUNS, Device, load

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/emulate"
CUDA = ROOT / "cpp/src/cuda"
MODULE_FOLDER = BUILD / "cpp/emulator"


def run(library: Path, op: str) -> list[str]:
    """Kinds of what the emulator reports, in a process of its own: a mutant may crash it."""
    command = [sys.executable, __file__, "--run", op, "--library", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return []
    if done.returncode < 0:
        return []  # a signal, which is no report
    if done.returncode != 0:
        raise RuntimeError(f"{op} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    kinds: list[str] = json.loads(done.stdout)
    return kinds


def reports_of(library: Path, op: str) -> list[str]:
    core = load("_emulated", library)
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
        print("hint: pytest tests/ops -k emulated", file=sys.stderr)
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
