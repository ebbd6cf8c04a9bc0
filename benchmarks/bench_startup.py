"""How long each command's ``--help`` takes beyond ``python -c ''``, interleaved, in milliseconds.

Usage: python benchmarks/bench_startup.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

PROGRAMS = ("planner", "data", "train", "convert")


def milliseconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    bare = (sys.executable, "-c", "")
    commands = {p: (sys.executable, "-m", f"fastllm_{p}", "--help") for p in PROGRAMS}
    times: dict[str, list[float]] = {name: [] for name in ("python", *PROGRAMS)}
    for _ in range(rounds):
        times["python"].append(milliseconds(*bare))
        for name, command in commands.items():
            times[name].append(milliseconds(*command))
    base = statistics.median(times["python"])
    result = {name: round(statistics.median(values) - base, 1) for name, values in times.items()}
    print(json.dumps({"rounds": rounds, "python_ms": round(base, 1), "beyond_python_ms": result}))


if __name__ == "__main__":
    main()
