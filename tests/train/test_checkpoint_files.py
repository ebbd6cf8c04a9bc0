"""Checkpoints appear whole or not at all, and a damaged one is named and passed over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllm_train import checkpoint
from fastllm_train.errors import UserError


def write(root: Path, step: int, content: bytes = b"weights") -> None:
    tag = checkpoint.tag_of(step)
    folder = checkpoint.saving_folder(root) / tag
    folder.mkdir()
    (folder / "states.pt").write_bytes(content + str(step).encode())
    checkpoint.publish(root, tag)


def test_newest_of_nothing_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") == checkpoint.Found(None, 0)


def test_newest_is_what_latest_names(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write(tmp_path, step)
    found = checkpoint.newest(tmp_path)
    assert (found.path, found.step, found.rejected) == (tmp_path / "global_step100", 100, ())
    assert (tmp_path / "latest").read_text().strip() == "global_step100"
    assert not (tmp_path / checkpoint.SAVING).exists()


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        write(tmp_path, step)
    assert checkpoint.prune(tmp_path, 0) == []
    assert checkpoint.prune(tmp_path, 2) == ["global_step5"]
    assert sorted(p.name for p in tmp_path.glob("global_step*")) == [
        "global_step10",
        "global_step100",
    ]


def truncate(folder: Path) -> None:
    (folder / "states.pt").write_bytes(b"w")


def remove(folder: Path) -> None:
    (folder / "states.pt").unlink()


def no_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).unlink()


def bad_manifest(folder: Path) -> None:
    (folder / checkpoint.MANIFEST).write_text("[1, 2")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "states.pt has 1 bytes, expected 9"),
        (remove, "states.pt is missing"),
        (no_manifest, "no readable manifest.json"),
        (bad_manifest, "no readable manifest.json"),
    ],
)
def test_damaged_newest_is_named_and_the_one_before_used(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10)
    damage(tmp_path / "global_step10")
    found = checkpoint.newest(tmp_path)
    assert found.step == 5
    assert len(found.rejected) == 1
    assert said in found.rejected[0]
    assert "global_step10" in found.rejected[0]


def test_a_checkpoint_above_latest_is_not_resumed_from(tmp_path: Path) -> None:
    """A kill between the rename and `latest`: the new one is whole, yet not announced."""
    write(tmp_path, 5)
    write(tmp_path, 10)
    (tmp_path / "latest").write_text("global_step5\n")
    assert checkpoint.newest(tmp_path).step == 5


def test_latest_that_names_nothing_falls_back(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (tmp_path / "latest").write_text("global_step7\n")
    found = checkpoint.newest(tmp_path)
    assert found.step == 5
    assert "names global_step7, which is not there" in found.rejected[0]


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the code under test runs after it."""


STEPS = [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir")]


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Make the ``count``-th file operation (and all after it) die."""
    seen = [0]

    def wrap(real: Callable[..., object]) -> Callable[..., object]:
        def dying(*args: object, **kwargs: object) -> object:
            seen[0] += 1
            if seen[0] >= count:
                raise Killed
            return real(*args, **kwargs)

        return dying

    for module, name in STEPS:
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))
    return seen


@pytest.mark.parametrize("resave", [False, True])
def test_a_kill_at_any_file_operation_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resave: bool
) -> None:
    """Publishing step 10 (over an older step 10 too) and pruning, killed at each operation."""
    survived: set[int] = set()
    for count in range(1, 100):
        root = tmp_path / str(count)
        write(root, 3)
        write(root, 5)
        if resave:
            write(root, 10, b"stale")
            (root / "latest").write_text("global_step5\n")
        with monkeypatch.context() as patch:
            seen = kill_at(patch, count)
            try:
                write(root, 10)
                checkpoint.prune(root, 1)
            except Killed:
                pass
        found = checkpoint.newest(root)
        assert found.path is not None
        assert found.step in (5, 10)
        content = (found.path / "states.pt").read_bytes()
        assert content == b"weights" + str(found.step).encode()
        survived.add(found.step)
        write(root, 12)  # and the next save works
        assert checkpoint.newest(root).step == 12
        if seen[0] < count:
            break
    else:
        pytest.fail("the sequence has more operations than the test kills")
    assert survived == {5, 10}


def test_clear_removes_everything(tmp_path: Path) -> None:
    write(tmp_path, 5)
    checkpoint.clear(tmp_path)
    assert checkpoint.newest(tmp_path).path is None
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.require_space(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**29)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"0.50 GiB free, a checkpoint takes 1.00 GiB"):
        checkpoint.require_space(tmp_path, 2**30)
