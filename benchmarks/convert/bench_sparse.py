"""A 70B-shaped conversion, planned and run, on sparse files: time and anonymous memory.

Usage: python bench_sparse.py SCRATCH

Makes LLaMA-2-70B's shapes (138 GB, no blocks on disk) as one Hugging Face file in SCRATCH, converts
them along every route below and prints one JSON line each: seconds, and the peak of anonymous
memory of the process tree. Holes are skipped and stay holes, so the times say nothing about
copying; whether everything is planned, cut and accounted for in bounded memory is the point.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from bench_convert import CLI, fresh, timed

from fastllm_convert.dtypes import BF16
from fastllm_convert.files.safetensors_file import build_header
from fastllm_planner.arch import iter_params, preset, to_hf_config

# (source, target, options): a later route reads what an earlier one wrote.
ROUTES = (
    ("hf", "hf-again", ["--to", "hf"]),
    ("hf", "megatron", ["--to", "megatron", "--tp", "8", "--pp", "4"]),
    ("hf", "meta", ["--to", "meta", "--tp", "8"]),
    ("meta", "hf-from-meta", ["--to", "hf"]),
    ("megatron", "hf-from-megatron", ["--to", "hf"]),
)


def make_sparse(folder: Path) -> None:
    spec = preset("llama-2-70b")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(spec, dtype="bfloat16")))
    params = sorted((p for p in iter_params(spec) if p.tied_to is None), key=lambda p: p.name)
    header = build_header([(p.name, BF16, p.shape) for p in params])
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        os.ftruncate(file.fileno(), len(header) + 2 * sum(p.numel for p in params))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    scratch: Path = parser.parse_args().scratch
    if not (scratch / "hf").exists():
        make_sparse(scratch / "hf")
    plan = [*CLI, "plan", str(scratch / "hf"), "--to", "megatron", "--tp", "8", "--pp", "4"]
    seconds, _, memory = timed(plan)
    print(json.dumps({"plan": "hf → megatron tp 8 pp 4", "s": round(seconds, 2)}), flush=True)
    for source, target, options in ROUTES:
        out = fresh(scratch / target)
        seconds, _, memory = timed([*CLI, "run", str(scratch / source), str(out), *options])
        row = {"route": f"{source} → {target}", "s": round(seconds, 2)}
        print(json.dumps({**row, "anon_mb": round(memory / 1e6)}), flush=True)
    for _, target, _ in ROUTES:
        shutil.rmtree(scratch / target)


if __name__ == "__main__":
    main()
