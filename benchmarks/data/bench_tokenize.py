"""fastllm-data against the reference path and the fastest peer, same text, same tokenizer, one run.

    python benchmarks/data/bench_tokenize.py corpus.jsonl --tokenizer tokenizer.model --runs 3

Each run is a process of its own. CPU seconds count user and system time of the process and its
children, start-up included: on a shared machine they say more than wall time. Peers that are not
installed are left out: `pip install --no-deps gigatoken megatron-core` and torch for all of them.

- fastllm: `fastllm-data tokenize`, whole: hashing of the output and comparison of samples included.
- reference: what Megatron-LM's tool does: json.loads, the tokenizer's library text by text, and
  megatron-core's IndexedDatasetBuilder (without it: our Python writer).
- gigatoken: encode_files on the JSONL file, ids written by numpy.

The number after a name is that of worker threads. The reference has one and takes minutes, so it
runs once.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def run_reference(source: Path, tokenizer: Path, out: Path) -> None:
    from fastllm_data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    encode, eod = loaded.reference.encode, loaded.eod_id
    assert eod is not None
    dtype = np.int32 if loaded.int32 else np.uint16
    try:
        import torch
        from megatron.core.datasets.indexed_dataset import (  # pyright: ignore[reportMissingImports]
            IndexedDatasetBuilder,
        )

        builder: Any = IndexedDatasetBuilder(f"{out}.bin", dtype=dtype)
        with source.open(encoding="utf-8") as lines:
            for line in lines:
                ids = encode([json.loads(line)["text"]])[0]
                if ids:
                    ids.append(eod)
                builder.add_document(torch.IntTensor(ids), [len(ids)] if ids else [])
        builder.finalize(f"{out}.idx")
    except ImportError:
        from fastllm_data import IndexedDatasetWriter

        with IndexedDatasetWriter(out, np.dtype(dtype).name) as writer, source.open() as lines:
            for line in lines:
                ids = encode([json.loads(line)["text"]])[0]
                if ids:
                    writer.add([*ids, eod])
                writer.end_document()


def run_gigatoken(source: Path, tokenizer: Path, out: Path) -> None:
    import gigatoken  # pyright: ignore[reportMissingImports]

    if tokenizer.name == "vocab.json":
        from tokenizers import Tokenizer

        from fastllm_data.tokenizer_json import parse_gpt2

        merges = tokenizer.with_name("merges.txt").read_bytes()
        parsed = parse_gpt2(tokenizer.read_bytes(), merges)
        loaded: Any = gigatoken.Tokenizer(Tokenizer.from_str(json.dumps(parsed)))
        eod = 50256
    else:
        loaded = gigatoken.Tokenizer.from_sentencepiece(str(tokenizer))
        eod = 2
    files: Any = gigatoken.JsonlFileSource([str(source)], field="text")
    arrays = loaded.encode_files(files)
    with out.with_name(out.name + ".bin").open("wb") as file:
        for ids in arrays:
            array = np.asarray(ids, dtype=np.uint16)
            file.write(np.append(array, np.uint16(eod)).tobytes())


def command(name: str, source: Path, tokenizer: Path, out: Path) -> list[str]:
    if name.startswith("fastllm"):
        flags = ["--append-eod", "--workers", name.rpartition("-")[2], "--force"]
        paths = [str(source), "--tokenizer", str(tokenizer), "--out", str(out)]
        return [sys.executable, "-m", "fastllm_data", "tokenize", *paths, *flags]
    return [sys.executable, __file__, str(source), "--tokenizer", str(tokenizer), "--only", name,
            "--out", str(out)]  # fmt: skip


def measure(args: list[str], threads: str) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds, peak MB of a command; raises if it fails."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": threads}
    started = time.perf_counter()
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(said.strip().splitlines()[-1] if said.strip() else "it failed")
    assert isinstance(usage, resource.struct_rusage)
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def bench(source: Path, tokenizer: Path, runs: int, names: list[str]) -> None:
    with source.open(encoding="utf-8") as lines:
        text_mb = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
    print(f"{source.name}: {text_mb:.1f} MB of text, {tokenizer.name}, median of {runs}")
    print("| what | wall s | CPU s | MB / CPU s | peak MB | same .bin |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        first: Path | None = None
        for name in names:
            out = Path(folder) / name
            try:
                args = command(name, source, tokenizer, out)
                threads = name.rpartition("-")[2] if "-" in name else "1"
                repeats = 1 if name == "reference" else runs
                results = [measure(args, threads) for _ in range(repeats)]
            except RuntimeError as error:
                print(f"| {name} | {error} |")
                continue
            wall, cpu, peak = (statistics.median(column) for column in zip(*results, strict=True))
            suffix = "_text_document.bin" if name.startswith("fastllm") else ".bin"
            made = out.with_name(out.name + suffix)
            first = first or made
            same = "yes" if filecmp.cmp(made, first, shallow=False) else "NO"
            rate = text_mb / cpu
            print(
                f"| {name} | {wall:.2f} | {cpu:.2f} | {rate:.1f} | {peak:.0f} | {same} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--names", default="fastllm-1,fastllm-2,gigatoken-1,gigatoken-2,reference")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "reference":
        run_reference(args.source, args.tokenizer, args.out)
    elif args.only and args.only.startswith("gigatoken"):
        run_gigatoken(args.source, args.tokenizer, args.out)
    else:
        bench(args.source, args.tokenizer, args.runs, args.names.split(","))


if __name__ == "__main__":
    main()
