"""A run that is killed goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastllm_data import UserError
from fastllm_data import tokenize as tokenize_module
from fastllm_data.checkpoint import STATE_FILE
from fastllm_data.tokenize import TokenizeOptions, tokenize

NAMES = ("text_document.bin", "text_document.idx", "errors.txt", "quarantine")


def corpus(path: Path, documents: int, seed: int = 0) -> Path:
    """Lines of very different lengths, some bad, some with escapes."""
    rng = random.Random(seed)
    words = "the quick brown naïve fox\n世界 jumps over 12345 lazy dogs".split(" ")
    lines: list[str] = []
    for i in range(documents):
        text = " ".join(
            rng.choice(words) for _ in range(rng.choice([0, 3, 30, 3000 if i % 50 == 0 else 9]))
        )
        lines.append(json.dumps({"text": text}, ensure_ascii=bool(i % 2)))
        if i % 97 == 0:
            lines.append('{"text": bad ' + str(i))
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def options(sources: list[Path], model: Path, out: Path, **changed: object) -> TokenizeOptions:
    return TokenizeOptions(
        inputs=tuple(map(str, sources)),
        tokenizer=model,
        out=out,
        append_eod=True,
        on_error="quarantine",
        workers=2,
        checkpoint_bytes=20_000,
        **changed,  # pyright: ignore[reportArgumentType]
    )


def outputs(out: Path) -> dict[str, bytes]:
    found = {name: out.with_name(f"{out.name}_{name}") for name in NAMES[:2]}
    found |= {name: out.with_name(f"{out.name}.{name}") for name in NAMES[2:]}
    return {name: path.read_bytes() for name, path in found.items()}


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [
        corpus(tmp_path / "a.jsonl", 900, 1),
        corpus(tmp_path / "b.jsonl.gz", 900, 2),
        corpus(tmp_path / "c.jsonl", 900, 3),
    ]


def test_stopping_at_any_checkpoint(
    sources: list[Path], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every checkpoint in turn the process 'dies'; the next one goes on."""
    whole = tokenize(options(sources, small_model, tmp_path / "whole"))

    class Died(KeyboardInterrupt):
        pass

    real = tokenize_module.Checkpoint.save
    deaths = 0

    def save_and_die(self: tokenize_module.Checkpoint, work: Path) -> None:
        nonlocal deaths
        real(self, work)
        deaths += 1
        raise Died

    monkeypatch.setattr(tokenize_module.Checkpoint, "save", save_and_die)
    resumed = None
    while resumed is None:
        try:
            resumed = tokenize(options(sources, small_model, tmp_path / "cut", resume=True))
        except Died:
            if deaths > 500:
                raise
        if deaths and not (tmp_path / "cut.partial").exists():
            break
        # What a kill may leave after the last checkpoint must not matter.
        state = json.loads((tmp_path / "cut.partial" / STATE_FILE).read_text())
        for path in (tmp_path / "cut.partial").iterdir():
            if state["stage"] == "build" and (
                path.suffix in (".bin", ".lengths", ".documents", ".txt")
                or path.name == "quarantine"
            ):
                with path.open("ab") as file:
                    file.write(b"torn")
    assert deaths > 10
    assert resumed is not None
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    assert resumed.counts == whole.counts
    assert not (tmp_path / "cut.partial").exists()


def command(source: Path, model: Path, out: Path, *more: str) -> list[str]:
    args = [
        sys.executable,
        "-m",
        "fastllm_data",
        "tokenize",
        str(source),
        "--tokenizer",
        str(model),
    ]
    args += ["--append-eod", "--on-error", "quarantine", "--encoder", "reference"]
    args += ["--workers", "2", "--checkpoint-mb", "0.05", "--resume", "--out", str(out)]
    return [*args, *more]


@pytest.mark.slow
def test_kill_9_at_20_random_moments(small_model: Path, tmp_path: Path) -> None:
    """One job is killed and resumed until it has been killed 20 times, then let finish."""
    source = corpus(tmp_path / "in.jsonl", 60_000)
    tokenize(options([source], small_model, tmp_path / "whole", reference_only=True))
    state = tmp_path / "cut.partial" / STATE_FILE
    rng = random.Random(0)
    kills, status, err = 0, -signal.SIGKILL, b""
    while status == -signal.SIGKILL:
        process = subprocess.Popen(
            command(source, small_model, tmp_path / "cut"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        before = state.read_bytes() if state.exists() else b""
        # Until there is a new checkpoint, so that the job moves on, and then a random while longer.
        while process.poll() is None and (not state.exists() or state.read_bytes() == before):
            time.sleep(0.001)
        if kills < 20:
            time.sleep(rng.uniform(0, 0.06))
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        _, err = process.communicate()
        status = process.returncode
    assert status == 0, err
    assert kills == 20
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


@pytest.mark.parametrize("limit", [3_000, 40_000, 90_000, 150_000])
def test_a_full_disk_is_said_and_gone_on_from(
    limit: int, small_model: Path, tmp_path: Path
) -> None:
    """No file may grow over ``limit`` bytes, so a write fails: early, late, or in the index."""
    source = corpus(tmp_path / "in.jsonl", 3000)
    tokenize(options([source], small_model, tmp_path / "whole", reference_only=True))
    sizes = [len(content) for content in outputs(tmp_path / "whole").values()]
    assert max(sizes) > limit
    args = command(source, small_model, tmp_path / "cut")
    args[args.index("0.05")] = "0.02"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    done = subprocess.run(args, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert re.search(r"error: \S*cut\.partial/\S+: File too large\n", done.stderr), done.stderr
    assert "hint: free some space first" in done.stderr
    names = {path.name for path in tmp_path.iterdir()} - {p.name for p in tmp_path.glob("whole*")}
    kept = {"cut.partial"} if "--resume" in done.stderr else set[str]()
    assert names == {"in.jsonl"} | kept
    assert bool(kept) == (limit > 3_000)
    assert subprocess.run(args, capture_output=True, check=False).returncode == 0
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


def test_a_bad_line_late_in_a_run_loses_nothing(small_model: Path, tmp_path: Path) -> None:
    """Stopped at a bad line, the run goes on past it with another policy."""
    source = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": f"fox number {i}"}) for i in range(4000)]
    lines[3900] = "bad"
    source.write_text("\n".join(lines))

    def job(out: str, **changed: object) -> TokenizeOptions:
        return TokenizeOptions(
            (str(source),), small_model, tmp_path / out, checkpoint_bytes=20_000,
            **changed,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    with pytest.raises(UserError, match=r"in\.jsonl:3901: column 1: not JSON") as caught:
        tokenize(job("cut"))
    assert "--resume with --on-error skip or quarantine" in caught.value.hint
    assert json.loads((tmp_path / "cut.partial" / STATE_FILE).read_text())["line"] > 3000
    done = tokenize(job("cut", resume=True, on_error="quarantine"))
    assert done.counts["documents"] == 3999
    assert done.errors_file == str(tmp_path / "cut.errors.txt")
    tokenize(job("whole", on_error="quarantine"))
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    # A clean run in its place removes the lists of the old one.
    source.write_text("\n".join(lines[:3900]))
    assert tokenize(job("cut", force=True)).errors_file is None
    assert not (tmp_path / "cut.errors.txt").exists()
    assert not (tmp_path / "cut.quarantine").exists()


def test_other_jobs_are_not_resumed(
    sources: list[Path], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, "_write_sidecar", die)
        with pytest.raises(KeyboardInterrupt):
            tokenize(options(sources, small_model, tmp_path / "x"))
    assert (tmp_path / "x.partial" / STATE_FILE).exists()
    with pytest.raises(UserError, match="a run is writing it, or was stopped"):
        tokenize(options(sources, small_model, tmp_path / "x"))
    with pytest.raises(UserError, match="other inputs"):
        tokenize(options(sources[:2], small_model, tmp_path / "x", resume=True))
    with pytest.raises(UserError, match="other options"):
        tokenize(options(sources, small_model, tmp_path / "x", resume=True, add_bos=True))
    tokenize(options(sources, small_model, tmp_path / "x", resume=True))
    tokenize(options(sources, small_model, tmp_path / "y"))
    assert outputs(tmp_path / "x") == outputs(tmp_path / "y")


def test_two_runs_do_not_write_one_output(
    sources: list[Path], small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tokenize_module.choose_encoder

    def while_running(*args: object) -> object:
        with pytest.raises(UserError, match="another run is writing it"):
            tokenize(options(sources, small_model, tmp_path / "x", force=True))
        return real(*args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(tokenize_module, "choose_encoder", while_running)
    tokenize(options(sources, small_model, tmp_path / "x"))
