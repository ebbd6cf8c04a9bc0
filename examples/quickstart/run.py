"""The five steps on this machine, each with the real tool, and a table of what they gave.

Usage: python examples/quickstart/run.py [--out runs/quickstart] [--steps N] [--extra-steps N]

Stops at the first command that fails, with that command's own message and exit code.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VOCAB = 8192


@dataclass(frozen=True)
class Row:
    step: str
    command: str
    seconds: float
    result: str


class Quickstart:
    """Runs commands in order and remembers what to put into the closing table."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[Row] = []

    def run(self, *command: str, capture: bool = False) -> tuple[str, float]:
        """Run one command from the repository root; returns (its stdout if captured, seconds)."""
        print(f"\n$ {shlex.join(command)}", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE if capture else None, text=True, check=False
        )
        if done.returncode:
            print(f"error: exit code {done.returncode}: {shlex.join(command)}", file=sys.stderr)
            raise SystemExit(done.returncode)
        return done.stdout or "", time.monotonic() - start

    def step(self, name: str, command: Sequence[str], result: str, *, seconds: float) -> None:
        self.rows.append(Row(name, shlex.join(command), seconds, result))

    def heading(self, text: str) -> None:
        print(f"\n=== {text} {'=' * max(0, 90 - len(text))}", flush=True)


def plan(quickstart: Quickstart) -> None:
    quickstart.heading("1. plan")
    classic = (
        "fastllm-planner classic --hidden 8192 --layers 80 --seq-len 4096 --vocab 32000 --nodes 6 "
        "--gpus-per-node 4 --gpu-memory 80 --batch-size 8 --tokens 0.7e9 --tflops 140"
    ).split()
    _, seconds = quickstart.run(*classic)
    quickstart.step("plan", classic, "reference tables of LLaMA-70B", seconds=seconds)
    emitted = quickstart.out / "plan" / "train.toml"
    emitted.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *"fastllm-planner plan --model llama-10m --gpu cpu --gpus 2 --dtype fp32".split(),
        *"--global-batch 4 --seq-len 256 --emit".split(),
        str(emitted),
    ]
    _, seconds = quickstart.run(*command)
    quickstart.step("plan", command, f"strategy in {emitted}", seconds=seconds)


def data(quickstart: Quickstart) -> float:
    """Corpus, tokenizer, dataset. Returns the corpus's unigram entropy in nats per token."""
    quickstart.heading("2. data")
    out = quickstart.out
    corpus, tokenizer, prefix = out / "corpus.jsonl", out / "tokenizer", out / "data" / "corpus"
    command = [sys.executable, "examples/quickstart/make_corpus.py", str(corpus)]
    text, seconds = quickstart.run(*command, "--megabytes", "100", capture=True)
    print(text, end="")
    quickstart.step("data", ["python", *command[1:]], text.split(": ")[-1].strip(), seconds=seconds)

    command = ["fastllm-data", "train-tokenizer", str(corpus), "--vocab-size", str(VOCAB)]
    command += ["--out", str(tokenizer), "--force"]
    _, seconds = quickstart.run(*command)
    quickstart.step("data", command, f"SentencePiece BPE, {VOCAB} pieces", seconds=seconds)

    command = ["fastllm-data", "tokenize", str(corpus), "--append-eod", "--force"]
    command += ["--tokenizer", str(tokenizer / "tokenizer.model"), "--out", str(prefix)]
    text, seconds = quickstart.run(*command, "--json", capture=True)
    summary = json.loads(text)
    counts = f"{summary['documents']} documents, {summary['tokens']} tokens"
    print(counts)
    quickstart.step("data", command, counts, seconds=seconds)

    command = ["fastllm-data", "stats", f"{prefix}_text_document"]
    quickstart.run(*command)
    text, _ = quickstart.run(*command, "--json", capture=True)
    return float(json.loads(text)["unigram_entropy_nats"])


def train(quickstart: Quickstart, args: argparse.Namespace, entropy: float) -> Path:
    quickstart.heading("3. train")
    run = quickstart.out / "train"
    command = ["fastllm-train", "run", "configs/quickstart.toml"]
    if args.steps:
        command += [f"schedule.steps={args.steps}", "schedule.warmup_steps=2"]
    if quickstart.out != Path("runs/quickstart"):
        command += [
            f"base={quickstart.out / 'plan' / 'train.toml'}",
            f'data.paths=["{quickstart.out / "data" / "corpus_text_document"}"]',
            f"data.tokenizer={quickstart.out / 'tokenizer' / 'tokenizer.model'}",
            f"run.out={run}",
        ]
    if run.exists():
        shutil.rmtree(run)
    _, seconds = quickstart.run(*command)
    first, last = loss_ends(run)
    verdict = "below" if last < entropy else "NOT below"
    result = f"loss {first:.2f} -> {last:.2f}, {verdict} the unigram entropy {entropy:.2f} nats"
    print(result)
    quickstart.step("train", command, result, seconds=seconds)
    if last >= entropy and not args.steps:
        raise SystemExit(f"error: {result}")

    steps = steps_done(run)
    command = [*(word for word in command if not word.startswith("schedule.steps="))]
    command.append(f"schedule.steps={steps + args.extra_steps}")
    _, seconds = quickstart.run(*command)
    resumed = [r["resumed_from"] for r in records(run, "run") if r["resumed_from"] is not None]
    if resumed != [steps] or steps_done(run) != steps + args.extra_steps:
        raise SystemExit(f"error: the run did not resume from step {steps}: {resumed}")
    result = f"resumed at step {steps}, loss {loss_ends(run)[1]:.2f} at step {steps_done(run)}"
    print(result)
    quickstart.step("train", command, result, seconds=seconds)
    return run


def records(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def steps_done(run: Path) -> int:
    return records(run, "step")[-1]["step"]


def loss_ends(run: Path) -> tuple[float, float]:
    """First loss, and the mean of the last five (single batches of 4,096 tokens are noisy)."""
    losses = [record["loss"] for record in records(run, "step")]
    tail = losses[-5:]
    return losses[0], sum(tail) / len(tail)


def tflops(quickstart: Quickstart, run: Path) -> None:
    quickstart.heading("4. TFLOPs")
    command = ["fastllm-train", "report", str(run)]
    _, seconds = quickstart.run(*command)
    steps = records(run, "step")[3:]
    tokens = sum(s["tokens"] for s in steps) / sum(s["step_time_s"] for s in steps)
    mfu = sorted(s["mfu_full_pct"] for s in steps)[len(steps) // 2]
    result = f"{tokens:.0f} tokens/s, MFU {mfu:.0f} % (full attention, measured GEMM peak)"
    quickstart.step("TFLOPs", command, result, seconds=seconds)


def convert(quickstart: Quickstart, run: Path) -> None:
    quickstart.heading("5. convert")
    hf = quickstart.out / "hf"
    command = ["fastllm-convert", "run", str(run / "checkpoints"), str(hf), "--to", "hf", "--force"]
    _, seconds = quickstart.run(*command)
    quickstart.step("convert", command, f"Hugging Face folder {hf}", seconds=seconds)
    script = "examples/quickstart/check_and_generate.py"
    text, seconds = quickstart.run(sys.executable, script, str(run), str(hf), capture=True)
    print(text, end="")
    command = ["python", script, str(run), str(hf)]
    quickstart.step("convert", command, text.splitlines()[0], seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=0, help="training steps (0: the config's)")
    parser.add_argument("--extra-steps", type=int, default=5, help="steps after the resume")
    args = parser.parse_args()
    started = time.monotonic()
    quickstart = Quickstart(args.out)
    plan(quickstart)
    entropy = data(quickstart)
    run = train(quickstart, args, entropy)
    tflops(quickstart, run)
    convert(quickstart, run)
    quickstart.heading("done")
    rows = [[row.step, row.command, f"{row.seconds:.1f} s", row.result] for row in quickstart.rows]
    widths = [None, 64, None, 44]
    headers = ["step", "command to run it alone", "time", "result"]
    print(tabulate(rows, headers=headers, tablefmt="grid", maxcolwidths=widths))
    print(f"total {time.monotonic() - started:.0f} s; everything is under {args.out}")


if __name__ == "__main__":
    main()
