"""How many bugs planted in the kernels' PTX the PTX emulator reports.

    python scripts/ptx_mutation_score.py [--op NAME] [--operator TEXT] [--part I/N] [--ptx FOLDER]
                                                                        # exit 0: none is missed

Each operator below is applied to every statement of every kernel that an op's runs execute, one at
a time. A load or store one access too far may stay within the tensor, and without a store to shared
memory or a publication of a tensor map an older one may be there, to which no checker can object:
if values differ, that is counted apart. Every other mutant must be reported. Mutants that can
change nothing are listed, with the reason, in mutants.toml ([[ptx_equivalent]]); an entry there, or
a number in one, that fits none is an error, too. Runs on what
`pytest tests/ops -k "ptx or gemm"` builds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mutation_runs import DEVICE_OPTIONS, GEMM_RUNS, OTHERS_KERNELS, RUNS, Device, load

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build/emulate-ptx/python"
SECONDS = 120  # of one mutant


def _bytes_of(opcode: str) -> int:
    vector = re.search(r"\.v([248])\b", opcode)
    bits = re.search(r"\.[busf](\d+)$", opcode)
    assert bits is not None, opcode
    return int(bits[1]) // 8 * (int(vector[1]) if vector else 1)


def _further(match: re.Match[str]) -> str:
    offset = int(match["offset"] or 0) + _bytes_of(match["opcode"])
    return f"{match['opcode']}{match['before']}+{offset}]"


@dataclass(frozen=True)
class Operator:
    name: str
    pattern: re.Pattern[str]
    change: str | Callable[[re.Match[str]], str]
    may_only_change_values: bool = False


OPERATORS = (
    Operator("barrier deleted", re.compile(r"\bbar(rier)?\.(cta\.)?sync[^;]*;"), ""),
    Operator("copy not waited for", re.compile(r"\bcp\.async\.wait_(group|all)[^;]*;"), ""),
    Operator(
        "mbarrier not waited for",
        re.compile(r"\bmbarrier\.try_wait\S*\s+(\w+),[^;]*;"),
        r"setp.eq.u32 \1, 0, 0;",
    ),
    Operator("arrival deleted", re.compile(r"\bmbarrier\.arrive[^;]*;"), ""),
    Operator("proxy fence deleted", re.compile(r"\bfence\.(proxy\.async|mbarrier_init)[^;]*;"), ""),
    Operator("map fence deleted", re.compile(r"\bfence\.proxy\.tensormap[^;]*;"), ""),
    Operator(
        "map not published",
        re.compile(r"\btensormap\.cp_fenceproxy[^;]*;"),
        "",
        may_only_change_values=True,
    ),
    Operator("wgmma fence deleted", re.compile(r"\bwgmma\.fence[^;]*;"), ""),
    Operator("wgmma not waited for", re.compile(r"\bwgmma\.wait_group[^;]*;"), ""),
    Operator("bulk store not waited for", re.compile(r"\bcp\.async\.bulk\.wait_group[^;]*;"), ""),
    Operator(
        "half the shuffle's lanes", re.compile(r"(\bshfl\.sync[^;]*, )[^,;]+;"), r"\g<1>65535;"
    ),
    Operator(
        "shared store deleted",
        re.compile(r"\bst\.shared[^;]*;"),
        "",
        may_only_change_values=True,
    ),
    Operator(
        "an access too far",
        re.compile(
            r"(?P<opcode>\b(?:ld|st)\.global[.\w:]*)(?P<before>\s+[^;]*?\[%rd\d+)"
            r"(?:\+(?P<offset>-?\d+))?\]"
        ),
        _further,
        may_only_change_values=True,
    ),
)


@dataclass(frozen=True)
class Mutant:
    kernel: str
    operator: Operator
    number: int  # of the kernel, among the run's
    nth: int  # of the operator's statements in the kernel
    line: int
    text: str  # of the module, with the bug


def mutants_of(core: Any, kernel: str, number: int) -> Iterator[Mutant]:
    """Every operator applied to every statement that the launches so far have executed."""
    lines = core.ptx_text(kernel).split("\n")
    reached = set(core.ptx_reached_lines(kernel))
    begin = next(i for i, text in enumerate(lines) if f".entry {kernel}(" in text)
    end = next((i for i in range(begin + 1, len(lines)) if ".entry " in lines[i]), len(lines))
    for operator in OPERATORS:
        nth = 0
        for i in range(begin, end):
            if operator.pattern.search(lines[i]) is None:
                continue
            if i + 1 in reached:
                changed = operator.pattern.sub(operator.change, lines[i], count=1)
                text = "\n".join([*lines[:i], changed, *lines[i + 1 :]])
                yield Mutant(kernel, operator, number, nth, i + 1, text)
            nth += 1


def outcome(core: Any, op: str) -> dict[str, Any]:
    """The kinds that are reported, and a digest of the values."""
    run = RUNS.get(op) or GEMM_RUNS[op]
    kinds: set[str] = set()
    digest = ""
    for schedule in (0, 1):
        core.set_options(schedule=schedule, **DEVICE_OPTIONS.get(op, {}))
        torch.manual_seed(1)
        device = Device(core)
        try:
            run(device)
        except RuntimeError:  # the launch was abandoned, of which there is a report
            if not core.reports():
                raise
        kinds |= {kind for kind, _, _ in core.reports()}
        core.clear_reports()
        digest += device.digest()
        if kinds:
            break
    return {"kinds": sorted(kinds), "digest": digest}


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, in a process of its own; a crash or no end is no report."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], SECONDS)
    answer = os.read(read, 1 << 16) if ready else b""
    os.close(read)
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return json.loads(answer) if answer else {"kinds": [], "digest": None}


def executed_kernels(core: Any, op: str) -> list[str]:
    """Those that are this op's own."""
    other = OTHERS_KERNELS.get(op, "$^")
    executed = [kernel for kernel in core.ptx_kernels() if core.ptx_reached_lines(kernel)]
    return [kernel for kernel in executed if re.search(other, kernel) is None]


def mutants(core: Any, kernels: list[str], operators: str) -> list[Mutant]:
    every = [m for number, kernel in enumerate(kernels) for m in mutants_of(core, kernel, number)]
    return [m for m in every if operators in m.operator.name]


def fits(entry: dict[str, Any], op: str, mutant: Mutant) -> bool:
    return (
        entry["op"] == op
        and entry["operator"] == mutant.operator.name
        and re.search(entry["kernel"], mutant.kernel) is not None
        and mutant.nth in entry["nth"]
    )


def module_of(op: str) -> str:
    return "_emulated_ptx" if op in RUNS else "_emulated_gemm"


def write_ptx(core: Any, op: str, kernels: list[str], folder: Path) -> None:
    """The modules' text, in whose lines the mutants are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, kernel in enumerate(kernels):
        (folder / f"{op}-{number}.ptx").write_text(core.ptx_text(kernel))


def line(op: str, mutant: Mutant, text: str) -> str:
    where = f"{mutant.number}:{mutant.line}"  # as in the file of write_ptx
    return f"{op:23s}{mutant.operator.name:26s}{mutant.nth:4d}  {where:9s}{text}"


def score(op: str, entries: list[dict[str, Any]], arguments: argparse.Namespace) -> Counter[str]:
    """How many mutants came to which verdict."""
    name = module_of(op)
    (library,) = BUILT.glob(f"{name}.*.so")
    core = load(name, library)
    for text in {core.ptx_text(kernel) for kernel in core.ptx_kernels()}:
        core.load_ptx(text)  # of these kernels nothing has run yet
    clean = outcome(core, op)
    # Some products read shared memory that nothing wrote (tests/ops/emulator_allowed.toml).
    allowed = set(clean["kinds"])
    if allowed - ({"uninit-shared"} if op in GEMM_RUNS else set()):
        raise SystemExit(f"error: {op} as it is is reported: {clean['kinds']}")
    kernels = executed_kernels(core, op)
    if arguments.ptx is not None:
        write_ptx(core, op, kernels, arguments.ptx)
    verdicts: Counter[str] = Counter()
    part, parts = arguments.part
    for index, mutant in enumerate(mutants(core, kernels, arguments.operator)):
        known = [e for e in entries if fits(e, op, mutant)]
        if index % parts != part - 1:
            for entry in known:  # of which another part tells
                entry.setdefault("used", set()).add(mutant.nth)
            continue

        def work(mutant: Mutant = mutant) -> dict[str, Any]:
            core.load_ptx(mutant.text)
            return outcome(core, op)

        found = in_child(work)
        kinds = set(found["kinds"]) - allowed
        if kinds:
            verdict, text = "reported", ", ".join(sorted(kinds))
        elif mutant.operator.may_only_change_values and found["digest"] not in (
            None,
            clean["digest"],
        ):
            verdict, text = "of values alone", "other values"
        elif known:
            known[0].setdefault("used", set()).add(mutant.nth)
            verdict, text = "equivalent", f"equivalent: {known[0]['reason']}"
        else:
            verdict, text = "missed", "NOT REPORTED"
        verdicts[verdict] += 1
        print(line(op, mutant, text), flush=True)
    return verdicts


def a_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2/3")
    return int(match[1]), int(match[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--op", choices=[*RUNS, *GEMM_RUNS], help="only this one")
    parser.add_argument("--operator", default="", help="only those whose name contains this")
    parser.add_argument(
        "--part", type=a_part, default=(1, 1), metavar="I/N", help="every Nth, from the Ith on"
    )
    parser.add_argument("--ptx", type=Path, metavar="FOLDER", help="write the kernels' PTX there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a forked child cannot use its parent's OpenMP threads
    ops = [arguments.op] if arguments.op else [*RUNS, *GEMM_RUNS]
    if not all(list(BUILT.glob(f"{module_of(op)}.*.so")) for op in ops):
        print("error: the PTX emulator is not built", file=sys.stderr)
        print('hint: pytest tests/ops -k "ptx or gemm"', file=sys.stderr)
        return 2
    entries = tomllib.loads((ROOT / "scripts/mutants.toml").read_text()).get("ptx_equivalent", [])
    verdicts: Counter[str] = Counter()
    for op in ops:
        verdicts += score(op, entries, arguments)
    unused = [
        (e["op"], e["operator"], nth)
        for e in entries
        for nth in e["nth"]
        if nth not in e.get("used", ()) and e["op"] in ops and arguments.operator in e["operator"]
    ]
    for entry in unused:
        print(f"error: an equivalent mutant that is none: {entry}", file=sys.stderr)
    counts = ", ".join(f"{n} {what}" for what, n in verdicts.items())
    print(f"{verdicts.total()} mutants: {counts}; {verdicts['missed'] or 'none'} left open")
    return 1 if verdicts["missed"] or unused else 0


if __name__ == "__main__":
    sys.exit(main())
