"""Shards on one machine, on Ray and as a Slurm array: byte for byte what one run writes."""

from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from fastllm_data import UserError
from fastllm_data.inputs import Source, find_sources
from fastllm_data.shards import plan_shards, run_here, run_shard, tokenize_in_shards
from fastllm_data.tokenize import TokenizeOptions, tokenize

NAMES = ("text_document.bin", "text_document.idx", "errors.txt", "quarantine")


def corpus(folder: Path, documents: int) -> list[Path]:
    """A plain and a compressed file, with bad lines in both."""
    rng = random.Random(5)
    words = "the quick brown naïve fox\n世界 jumps over 12345 lazy dogs".split(" ")
    files: list[Path] = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl"):
        lines: list[str] = []
        for i in range(documents):
            count = rng.choice([0, 3, 30, 2000 if i % 90 == 0 else 9])
            lines.append(json.dumps({"text": " ".join(rng.choice(words) for _ in range(count))}))
            if i % 61 == 7:
                lines.append(f'{{"text": bad {name} {i}')
        content = ("\n".join(lines) + "\n").encode()
        path = folder / name
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        files.append(path)
    return files


def options(files: list[Path], model: Path, out: Path, **changed: object) -> TokenizeOptions:
    return TokenizeOptions(
        inputs=tuple(map(str, files)),
        tokenizer=model,
        out=out,
        append_eod=True,
        on_error="quarantine",
        checkpoint_bytes=50_000,
        **changed,  # pyright: ignore[reportArgumentType]
    )


def outputs(out: Path) -> dict[str, bytes]:
    found = {name: out.with_name(f"{out.name}_{name}") for name in NAMES[:2]}
    found |= {name: out.with_name(f"{out.name}.{name}") for name in NAMES[2:]}
    return {name: path.read_bytes() for name, path in found.items()}


def sidecar(out: Path) -> dict[str, object]:
    return json.loads(out.with_name(f"{out.name}_text_document.meta.json").read_bytes())


@pytest.mark.parametrize("shards", [1, 2, 7, 30])
def test_shards_equal_one_run(shards: int, small_model: Path, tmp_path: Path) -> None:
    files = corpus(tmp_path, 500)
    whole = tokenize(options(files, small_model, tmp_path / "whole"))
    done = tokenize_in_shards(options(files, small_model, tmp_path / "cut"), shards, run_here)
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    assert done.counts == whole.counts
    one, many = sidecar(tmp_path / "whole"), sidecar(tmp_path / "cut")
    assert many.pop("shards") == shards
    for name in ("verified_samples", "encoder"):  # of each shard
        assert one.pop(name)
        assert many.pop(name)
    assert one == many
    assert not (tmp_path / "cut.shards").exists()


def test_a_bad_line_stops_with_its_line_in_the_file(small_model: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"fox {i}"}) for i in range(1000)]
    lines[900] = "bad"
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    job = TokenizeOptions((str(tmp_path / "x.jsonl"),), small_model, tmp_path / "c")
    with pytest.raises(UserError, match=r"x\.jsonl:901: column 1: not JSON"):
        tokenize_in_shards(job, 5, run_here)
    # The shards before it are done and are kept.
    assert (tmp_path / "c.shards" / "00003-of-00005_text_document.idx").exists()
    with pytest.raises(UserError, match="exists: a run is writing it, or was stopped"):
        tokenize_in_shards(job, 5, run_here)


def test_plans_cover_every_byte_once(tmp_path: Path) -> None:
    rng = random.Random(1)
    for case in range(300):
        sources: list[Source] = []
        for i in range(rng.randrange(1, 6)):
            kind = rng.choice(["plain", "gz"])
            size = rng.choice([0, 1, 5, rng.randrange(2000)])
            sources.append(Source(f"{i}", kind, size))
        shards = rng.randrange(1, 40)
        plan = plan_shards(sources, shards)
        assert len(plan) == shards
        for source in sources:
            parts = [part for shard in plan for part in shard if part.name == source.name]
            edges = [(part.begin, part.stop) for part in parts]
            assert edges[0][0] == 0, case
            assert edges[-1][1] == source.size, case
            assert all(a[1] == b[0] for a, b in pairwise(edges)), case
            assert len(parts) == 1 or source.divisible, case
        order = [int(part.name) for shard in plan for part in shard]
        assert order == sorted(order), case
    with pytest.raises(UserError, match="cannot be read in shards"):
        plan_shards(find_sources(("-",)), 2)


def test_only_missing_shards_are_done(small_model: Path, tmp_path: Path) -> None:
    files = corpus(tmp_path, 200)
    tokenize(options(files, small_model, tmp_path / "whole"))
    job = options(files, small_model, tmp_path / "cut")
    for shard in (3, 0):
        run_shard(job, shard, 4)
    again = run_shard(job, 3, 4)
    assert again.seconds == 0.0
    ran: list[int] = []

    def run(job: TokenizeOptions, missing: list[int], plan: list[list[Source]]) -> None:
        ran.extend(missing)
        run_here(job, missing, plan)

    resumed = options(files, small_model, tmp_path / "cut", resume=True)
    with pytest.raises(UserError, match="of a run with other arguments"):
        tokenize_in_shards(options(files, small_model, job.out, resume=True, add_bos=True), 4, run)
    tokenize_in_shards(resumed, 4, run)
    assert ran == [1, 2]
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


def test_slurm_scripts(small_model: Path, tmp_path: Path) -> None:
    """The scripts run with a stand-in for sbatch that runs what it is given, the array shuffled."""
    files = corpus(tmp_path, 200)
    tokenize(options(files, small_model, tmp_path / "whole"))
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("""#!/bin/bash
set -e
script="${@: -1}"
echo "$*" >> "$SBATCH_LOG"
last=$(sed -n 's/^#SBATCH --array=0-//p' "$script")
if [ -n "$last" ]; then
  for task in $(seq 0 "$last" | sort -R); do SLURM_ARRAY_TASK_ID=$task "$script" >&2; done
  echo "4711;cluster"
else
  "$script"
fi
""")
    sbatch.chmod(0o755)
    command = [sys.executable, "-m", "fastllm_data", "tokenize", *map(str, files)]
    command += ["--tokenizer", str(small_model), "--append-eod", "--on-error", "quarantine"]
    command += ["--out", str(tmp_path / "cut"), "--workers", "1", "--engine", "slurm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--engine slurm needs --shards" in done.stderr
    done = subprocess.run([*command, "--shards", "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    submit = tmp_path / "cut.slurm" / "submit.sh"
    assert done.stdout.splitlines()[-1] == f"next: {submit}"
    log = tmp_path / "log"
    env = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}", "SBATCH_LOG": str(log)}
    ran = subprocess.run([submit, "--account=x"], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    array, join = log.read_text().splitlines()
    assert array.startswith("--parsable --account=x ")
    assert join.startswith("--dependency=afterok:4711 --account=x ")
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="pip install 'fastllm-data[ray]'")
    monkeypatch.setenv("RAY_DISABLE_DOCKER_CPU_WARNING", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_ray_retries_a_shard_whose_worker_was_killed(small_model: Path, tmp_path: Path) -> None:
    """A local cluster, started by the command as users run it; workers die as they write."""
    files = corpus(tmp_path, 12_000)
    job = options(files, small_model, tmp_path / "whole", reference_only=True)
    tokenize(job)
    command = [sys.executable, "-m", "fastllm_data", "tokenize", *map(str, files)]
    command += ["--tokenizer", str(small_model), "--append-eod", "--on-error", "quarantine"]
    command += ["--encoder", "reference", "--checkpoint-mb", "0.05", "--out", str(tmp_path / "cut")]
    command += ["--engine", "ray", "--shards", "4", "--workers", "1", "--json"]
    killed: set[int] = set()

    def kill_some(process: subprocess.Popen[str]) -> None:
        while process.poll() is None and len(killed) < 2:
            for lock in (tmp_path / "cut.shards").glob("*.partial/lock"):
                if (lock.parent / "state.json").exists():  # something is written
                    words = lock.read_text().split()
                    if len(words) > 1 and int(words[1]) not in killed and len(killed) < 2:
                        os.kill(int(words[1]), signal.SIGKILL)
                        killed.add(int(words[1]))
            time.sleep(0.005)

    env = {**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        killer = threading.Thread(target=kill_some, args=(process,))
        killer.start()
        stdout, stderr = process.communicate(timeout=300)
        killer.join()
    assert process.returncode == 0, stderr
    assert len(killed) == 2
    assert json.loads(stdout)["bad_lines"] > 0
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
