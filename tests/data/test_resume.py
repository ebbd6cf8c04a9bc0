"""A run that is killed goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import gzip
import json
import os
import random
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


@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_random_moments(seed: int, small_model: Path, tmp_path: Path) -> None:
    source = corpus(tmp_path / "in.jsonl", 20_000, seed)
    tokenize(options([source], small_model, tmp_path / "whole", reference_only=True))
    command = [
        *(sys.executable, "-m", "fastllm_data", "tokenize", source, "--tokenizer", small_model),
        *("--append-eod", "--on-error", "quarantine", "--encoder", "reference", "--workers", "2"),
        *("--checkpoint-mb", "0.05", "--resume", "--out", tmp_path / "cut"),
    ]
    rng = random.Random(seed)
    kills, status, err = 0, -signal.SIGKILL, b""
    while status == -signal.SIGKILL and kills < 40:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + rng.uniform(0.15, 0.7)
        state = tmp_path / "cut.partial" / STATE_FILE
        # The first kill comes at the first checkpoint: something to go on with, much left to do.
        while process.poll() is None and (
            time.monotonic() < deadline if kills else not state.exists()
        ):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        _, err = process.communicate()
        status = process.returncode
    assert status == 0, err
    assert kills >= 1
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")


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
