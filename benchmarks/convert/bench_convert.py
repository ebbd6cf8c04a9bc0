"""Wall time and memory of conversions against ``cp`` of the same bytes, and against zero_to_fp32.

Usage: python bench_convert.py SCRATCH [--gigabytes 2.4] [--repeats 3] [--route NAME ...] [--zero]

Makes a random LLaMA in SCRATCH (needs about five times its size), converts it along every route,
and prints one JSON line per route: median and least seconds of the conversion and of ``cp -r`` of
its output, and the peak of anonymous memory of the process tree (RssAnon + RssShmem, 100 Hz).
Runs alternate between cp and convert, page cache warm for both; both are timed to the end of the
process, and again with a ``sync`` of the file system after it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from fastllm_convert.dtypes import BF16
from fastllm_convert.files.safetensors_file import build_header
from fastllm_planner.arch import ArchSpec, count_params, iter_params, to_hf_config

CLI = [sys.executable, "-m", "fastllm_convert"]
ROUTES: dict[str, tuple[str, list[str]]] = {
    "hf-hf": ("hf", ["--to", "hf"]),
    "meta1-hf": ("meta1", ["--to", "hf"]),
    "meta2-hf": ("meta2", ["--to", "hf"]),
    "hf-meta1": ("hf", ["--to", "meta"]),
    "hf-megatron": ("hf", ["--to", "megatron"]),
    "hf-megatron-tp2-pp2": ("hf", ["--to", "megatron", "--tp", "2", "--pp", "2"]),
    "megatron-tp2-pp2-hf": ("megatron22", ["--to", "hf"]),
    "deepspeed-hf": ("deepspeed", ["--to", "hf"]),
    "hf-fp32": ("hf", ["--to", "hf", "--dtype", "fp32"]),
}
MADE: dict[str, list[str]] = {
    "meta1": ["--to", "meta"],
    "meta2": ["--to", "meta", "--tp", "2"],
    "megatron22": ["--to", "megatron", "--tp", "2", "--pp", "2"],
    "deepspeed": ["--to", "deepspeed"],
}


def shape(gigabytes: float) -> ArchSpec:
    """docs/convert.md's bench shape (2048 wide, 32/8 heads); depth follows the size."""
    spec = ArchSpec(
        family="llama", layers=1, hidden=2048, heads=32, kv_heads=8, head_dim=64,
        ffn_hidden=5632, vocab=32_000, max_seq_len=4096,
    )  # fmt: skip
    base, one = count_params(spec), count_params(spec)
    two = count_params(ArchSpec(**{**vars_of(spec), "layers": 2}))
    one = two - base
    layers = max(2, round((gigabytes * 1e9 / 2 - base) / one / 2) * 2)
    return ArchSpec(**{**vars_of(spec), "layers": layers})


def vars_of(spec: ArchSpec) -> dict:
    return {name: getattr(spec, name) for name in spec.__dataclass_fields__}


def make_hf(folder: Path, spec: ArchSpec) -> None:
    """Random bf16 weights, written without holding the model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(spec, dtype="bfloat16")))
    params = [p for p in iter_params(spec) if p.tied_to is None]
    params.sort(key=lambda p: p.name)
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(build_header([(p.name, BF16, p.shape) for p in params]))
        for param in params:
            values = random.standard_normal(math.prod(param.shape), np.float32) * 0.02
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        except OSError:
            continue
        found += [int(x) for x in text.split()]
    return found


def anonymous(pid: int) -> int:
    """Bytes of anonymous and shared memory of a process tree."""
    total = 0
    for each in tree(pid):
        try:
            lines = Path(f"/proc/{each}/status").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith(("RssAnon", "RssShmem")):
                total += int(line.split()[1]) << 10
    return total


def timed(command: list[str]) -> tuple[float, float, int]:
    """(seconds, seconds with sync, peak anonymous bytes) of a command that must succeed."""
    peak, done = 0, threading.Event()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {errors.decode()}")
    os.sync()
    return seconds, time.perf_counter() - start, peak


def warm(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                buffer = bytearray(1 << 22)
                while opened.readinto(buffer):
                    pass


def fresh(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    return path


def bench(name: str, scratch: Path, repeats: int) -> dict:
    made, options = ROUTES[name]
    source, out = scratch / made, scratch / "out"
    runs: dict[str, list[tuple[float, float, int]]] = {"cp": [], "convert": [], "fsync": []}
    subprocess.run([*CLI, "run", source, fresh(out), *options], check=True, capture_output=True)
    reference = scratch / "reference"
    fresh(reference)
    out.rename(reference)
    size = sum(f.stat().st_size for f in reference.rglob("*") if f.is_file())
    for _ in range(repeats):
        warm(reference)
        fresh(out)
        runs["cp"].append(timed(["cp", "-r", str(reference), str(out)]))
        warm(source)
        fresh(out)
        command = [*CLI, "run", str(source), str(out), *options]
        runs["convert"].append(timed(command))
        warm(source)
        fresh(out)
        runs["fsync"].append(timed([*command, "--fsync"]))
    found: dict = {"route": name, "gigabytes": round(size / 1e9, 3)}
    for kind, rows in runs.items():
        for label, index in (("s", 0), ("s_synced", 1)):
            values = [row[index] for row in rows]
            found[f"{kind}_{label}"] = round(statistics.median(values), 2)
            found[f"{kind}_{label}_min"] = round(min(values), 2)
    # Like with like: neither waits for the disk; both do.
    found["ratio"] = round(found["convert_s"] / found["cp_s"], 2)
    found["ratio_least"] = round(found["convert_s_min"] / found["cp_s_min"], 2)
    found["ratio_on_disk"] = round(found["fsync_s_synced"] / found["cp_s_synced"], 2)
    found["anon_mb"] = round(max(row[2] for row in runs["convert"]) / 1e6)
    shutil.rmtree(reference)
    return found


def make_zero(folder: Path, stage: int) -> None:
    """ZeRO shards of 2 ranks as DeepSpeed lays them out: 2048 wide, 12 layers, 0.67 B."""
    import torch

    spec = ArchSpec(**{**vars_of(shape(1.0)), "layers": 12})
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    (folder / "config.json").write_text(json.dumps(to_hf_config(spec)))
    params = [p for p in iter_params(spec) if p.tied_to is None]
    shapes = {p.name: torch.Size(p.shape) for p in params}
    world = 2
    own = [-(-p.numel // world) for p in params]
    total = sum(p.numel for p in params)
    part = sum(own) if stage == 3 else -(-total // (2 * world)) * 2
    module = {
        p.name: torch.zeros(0 if stage == 3 else p.shape, dtype=torch.bfloat16) for p in params
    }
    state = {
        "module": module, "buffer_names": [], "param_shapes": [shapes], "shared_params": {},
        "frozen_param_shapes": None, "frozen_param_fragments": None, "dp_world_size": world,
        "ds_version": "0.19.8",
    }  # fmt: skip
    for rank in range(world):
        flat = torch.randn(part, generator=torch.Generator().manual_seed(rank))
        moments = {"step": torch.tensor(1.0), "exp_avg": flat * 2, "exp_avg_sq": flat * 3}
        inner = {"zero_stage": stage, "ds_version": "0.19.8"}
        if stage == 3:
            inner |= {"partition_count": world, "fp32_flat_groups": [flat]}
            inner["optimizer_state_dict"] = {"state": {0: moments}}
            torch.save(state, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        else:
            inner |= {"partition_count": [world], "single_partition_of_fp32_groups": [flat]}
            inner["base_optimizer_state"] = {"state": {0: moments}}
            torch.save(state, tag / "mp_rank_00_model_states.pt")
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save(
            {"optimizer_state_dict": inner, "ds_config": {}, "ds_version": "0.19.8"}, tag / name
        )


def bench_zero(stage: int, scratch: Path, repeats: int) -> dict:
    """Against DeepSpeed's own zero_to_fp32 (with safetensors output)."""
    source, out = scratch / f"zero{stage}", scratch / "out"
    if not source.exists():
        make_zero(source, stage)
    ours = [*CLI, "run", str(source), str(out), "--to", "hf", "--weights", "master"]
    code = (
        "import sys; from deepspeed.utils.zero_to_fp32 import "
        "convert_zero_checkpoint_to_fp32_state_dict as c; "
        "c(sys.argv[1], sys.argv[2], safe_serialization=True)"
    )
    theirs = [sys.executable, "-c", code, str(source), str(out)]
    commands = {"zero_to_fp32": theirs, "convert": ours, "convert_fsync": [*ours, "--fsync"]}
    rows: dict[str, list[tuple[float, float, int]]] = {kind: [] for kind in commands}
    for _ in range(repeats):
        for kind, command in commands.items():
            warm(source)
            fresh(out)
            rows[kind].append(timed(command))
    found: dict = {"route": f"zero{stage}-hf (fp32 masters)"}
    for kind, runs in rows.items():
        found[f"{kind}_s"] = round(statistics.median(r[0] for r in runs), 2)
        found[f"{kind}_anon_mb"] = round(max(r[2] for r in runs) / 1e6)
    for kind in ("convert", "convert_fsync"):
        found[f"{kind}_speedup"] = round(found["zero_to_fp32_s"] / found[f"{kind}_s"], 2)
    fresh(out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--route", action="append", choices=list(ROUTES))
    parser.add_argument("--zero", action="store_true", help="only the ZeRO comparison")
    args = parser.parse_args()
    scratch: Path = args.scratch
    if args.zero:
        for stage in (2, 3):
            print(json.dumps(bench_zero(stage, scratch, args.repeats)), flush=True)
        return
    if not (scratch / "hf").exists():
        make_hf(scratch / "hf", shape(args.gigabytes))
    for name in args.route or ROUTES:
        made = ROUTES[name][0]
        if made != "hf" and not (scratch / made).exists():
            command = [*CLI, "run", scratch / "hf", scratch / made, *MADE[made]]
            subprocess.run(command, check=True, capture_output=True)
        print(json.dumps(bench(name, scratch, args.repeats)), flush=True)


if __name__ == "__main__":
    main()
