"""Interrupted runs: kill −9 at any moment and start again, a full disk, Ctrl-C."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sample_checkpoints import Convert, random_tensors, tiny_spec, write_hf

from fastllm_convert.engine import journal, linux_calls, writer

# Slows every task down, so that a kill lands between tasks as well as inside one.
SLOW = """
import sys, time
from fastllm_convert.engine import tasks as cutting, writer
cutting.CHUNK = cutting.RUN_CHUNK = 64 << 10
real = writer.run_task
def slow(*args, **kwargs):
    time.sleep(0.004)
    return real(*args, **kwargs)
writer.run_task = slow
from fastllm_convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("target", ["hf", "megatron"])
def test_killed_at_ten_random_moments_and_resumed(
    tmp_path: Path, convert: Convert, target: str
) -> None:
    spec = tiny_spec(layers=8, hidden=256, heads=8, head_dim=32, ffn_hidden=640, vocab=2048)
    source = write_hf(tmp_path / "src", spec, random_tensors(spec, torch.bfloat16))
    options = ["--to", target, "--dtype", "fp32", "--shard-size", "3MB"]
    options = options if target == "hf" else ["--to", target, "--tp", "2", "--pp", "2"]
    out, expected = tmp_path / "out", tmp_path / "expected"
    convert("run", source, expected, *options)
    command = [sys.executable, "-c", SLOW, "run", str(source), str(out), *options]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    subprocess.run(["rm", "-r", str(out)], check=True)
    moments = random.Random(7)
    killed = 0
    for _ in range(10):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(0.3 + moments.random() * max(0.2, whole - 0.5))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if out.exists():  # finished before the kill: complete, never in between
            assert everything(out) == everything(expected)
            subprocess.run(["rm", "-r", str(out)], check=True)
    assert killed >= 1, "the kills came too late to test anything"
    convert("run", source, out, *options)
    assert everything(out) == everything(expected)
    assert {p.name for p in tmp_path.iterdir()} == {"src", "out", "expected"}


def test_a_resumed_run_copies_only_what_is_missing(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))
    convert("run", source, tmp_path / "expected", "--to", "hf")
    real = writer.run_task
    copied: list[str] = []

    def stop_after_five(task, piece, *args, **kwargs):  # type: ignore[no-untyped-def]
        if len(copied) == 5:
            raise KeyboardInterrupt
        copied.append(piece.label)
        return real(task, piece, *args, **kwargs)

    monkeypatch.setattr(writer, "run_task", stop_after_five)
    convert("run", source, tmp_path / "out", "--to", "hf", "--threads", "1", status=130)
    assert (tmp_path / ".out.partial").is_dir()
    first, copied = list(copied), []
    monkeypatch.setattr(writer, "run_task", real)
    seen: list[str] = []

    def note(task, piece, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.append(piece.label)
        return real(task, piece, *args, **kwargs)

    monkeypatch.setattr(writer, "run_task", note)
    convert("run", source, tmp_path / "out", "--to", "hf")
    assert not set(first) & set(seen), "a finished tensor was copied again"
    assert everything(tmp_path / "out") == everything(tmp_path / "expected")


@pytest.mark.parametrize("change", ["source", "options", "boot"])
def test_what_was_left_counts_only_for_the_same_work(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    spec = tiny_spec()
    canonical = random_tensors(spec)
    source = write_hf(tmp_path / "src", spec, canonical)
    real = writer.run_task
    calls = 0

    def interrupt(*args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(writer, "run_task", interrupt)
    convert("run", source, tmp_path / "out", "--to", "hf", "--threads", "1", status=130)
    monkeypatch.setattr(writer, "run_task", real)
    options = ["--to", "hf"]
    if change == "source":
        for tensor in canonical.values():
            tensor += 1
        subprocess.run(["rm", "-r", str(source)], check=True)
        write_hf(source, spec, canonical)
    elif change == "options":
        options += ["--dtype", "bf16"]
    else:
        monkeypatch.setattr(journal, "_boot_id", lambda: "another boot")
    convert("run", source, tmp_path / "out", *options)
    convert("run", source, tmp_path / "clean", *options)
    assert everything(tmp_path / "out") == everything(tmp_path / "clean")


@pytest.mark.parametrize("moment", ["reserve", "copy_file_range", "pwrite"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(linux_calls if moment == "reserve" else os, moment, full)
    assert "disk is full" in refused("run", source, tmp_path / "out", "--to", "hf")
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_too_little_space_is_seen_before_writing(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))
    real = os.statvfs

    def small(path: str) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 1  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", small)
    assert "free" in refused("run", source, tmp_path / "out", "--to", "hf")
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_two_runs_do_not_share_a_target(
    tmp_path: Path, convert: Convert, refused: Callable[..., str]
) -> None:
    import fcntl

    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    with (partial / ".journal").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another run" in refused("run", source, tmp_path / "out", "--to", "hf")
        assert (partial / ".journal").exists(), "the other run's work was removed"
    convert("run", source, tmp_path / "out", "--to", "hf")
