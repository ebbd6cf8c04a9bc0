"""Checkpoints on disk ([checkpoint]): whole or absent, the newest good one found, old ones removed.

An engine writes ``.saving/<tag>/…``; ``publish`` records every file's size in ``manifest.json``,
fsyncs, renames the folder to ``<tag>`` and only then points ``latest`` at it. So a process killed
at any moment leaves either the previous state or the new one. Readers check the manifest's sizes:
a damaged checkpoint is named and the one before it used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastllm_train.engine_choice import chosen_engine
from fastllm_train.errors import UserError
from fastllm_train.run_folder import fsync_folder, write_atomically

if TYPE_CHECKING:
    from fastllm_train.config import Config

SAVING = ".saving"
REMOVING = ".removing"
MANIFEST = "manifest.json"
SCHEMA = 1
_TAG = re.compile(r"global_step(\d+)")


@dataclass(frozen=True)
class CheckpointConfig:
    """``every`` steps (0: only at the end); ``keep_last`` 0 keeps all.

    ``format``: "deepspeed" is DeepSpeed's own, resumed in the same layout only; "portable" is
    layout-free (``portable.py``); "auto" is DeepSpeed's where its engine trains and its files can
    hold the layout.
    ``background``: training goes on while a portable checkpoint is written.
    """

    every: int = 100
    keep_last: int = 2
    format: Literal["auto", "deepspeed", "portable"] = "auto"
    background: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "keep_last"):
            if getattr(self, name) < 0:
                raise UserError(f"checkpoint.{name}={getattr(self, name)} is negative")


def written_format(config: Config) -> str:
    """ "deepspeed" or "portable". DeepSpeed alone writes its files. They cannot hold experts shared
    out over ranks; those of pipeline stages are resumed from and converted, but no tool of
    DeepSpeed reads them; states on NVMe it does not restore (0.19)."""
    if config.checkpoint.format != "auto":
        return config.checkpoint.format
    parallel = config.parallel
    beyond = parallel.ep > 1 or parallel.pp > 1 or parallel.nvme_path
    return "portable" if beyond or chosen_engine(config) == "torch" else "deepspeed"


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint (None: there is none) and what was wrong with newer ones."""

    path: Path | None
    step: int
    rejected: tuple[str, ...] = ()


def tag_of(step: int) -> str:
    return f"global_step{step}"


def step_of(tag: str) -> int | None:
    match = _TAG.fullmatch(tag)
    return int(match[1]) if match else None


def saving_folder(root: Path) -> Path:
    """Where an engine writes a checkpoint before it is published. Emptied of earlier attempts."""
    folder = root / SAVING
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def require_space(folder: Path, needed: int) -> None:
    """``UserError`` when ``folder``'s file system has fewer than ``needed`` bytes free: a full disk
    in the middle of a save would leave ranks waiting for each other."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / 2**30:.2f} GiB free, a checkpoint takes {needed / 2**30:.2f} GiB",
            hint="the previous checkpoint is intact: make room, then run the same command again",
        )


def publish(root: Path, tag: str, layout: Mapping[str, object] | None = None) -> Path:
    """Make ``root/.saving/<tag>`` the newest checkpoint. Call it once, after all ranks
    wrote. ``layout`` (JSON values) is what a reader must share to load it; None: nothing."""
    written = root / SAVING / tag
    sizes = {}
    for file in _files(written):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[str(file.relative_to(written))] = file.stat().st_size
    manifest = {"schema": SCHEMA, "step": step_of(tag), "layout": layout, "files": sizes}
    write_atomically(written / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    target = root / tag
    if target.exists():
        # Only a checkpoint that was rejected, or is newer than the one resumed from, is replaced.
        _discard(root, target)
    written.rename(target)
    fsync_folder(root)
    write_atomically(root / "latest", tag + "\n")
    shutil.rmtree(root / SAVING, ignore_errors=True)
    return target


def prune(root: Path, keep_last: int) -> list[str]:
    """Remove all but the ``keep_last`` newest (0: none); the one ``latest`` names stays."""
    if keep_last == 0:
        return []
    named = _read_latest(root)
    old = [path for path in _newest_first(root)[keep_last:] if path.name != named]
    for path in old:
        _discard(root, path)
    return [path.name for path in old]


def newest(root: Path) -> Found:
    """What to resume from: the checkpoint ``latest`` names, else the newest good one below."""
    named = _read_latest(root)
    rejected: list[str] = []
    if named is not None and step_of(named) is None:
        rejected.append(f"{root / 'latest'} names {named!r}, which is not a checkpoint's tag")
        named = None
    limit = step_of(named) if named is not None else None
    if named is not None and not (root / named).is_dir():
        rejected.append(f"{root / 'latest'} names {named}, which is not there")
    for path in _newest_first(root):
        step = step_of(path.name)
        assert step is not None
        if limit is not None and step > limit:
            continue  # newer than `latest`: its run was rewound past it
        fault = check(path)
        if fault is None:
            return Found(path, step, tuple(rejected))
        rejected.append(fault)
    return Found(None, 0, tuple(rejected))


def check(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Reads names and sizes, no tensor."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: no readable {MANIFEST} ({error})"
    if manifest.get("schema") != SCHEMA:
        return f"{path}: {MANIFEST} has schema {manifest.get('schema')!r}, expected {SCHEMA}"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{path}: {name} is missing"
        if file.stat().st_size != size:
            return f"{path}: {name} has {file.stat().st_size} bytes, expected {size}"
    return None


def layout_of(path: Path) -> dict[str, object] | None:
    """The layout that ``publish`` recorded; None: any layout loads it."""
    layout = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("layout")
    return layout if isinstance(layout, dict) else None


def clear(root: Path) -> None:
    """Remove every checkpoint (``--fresh``); ``latest`` first, so that it never dangles."""
    (root / "latest").unlink(missing_ok=True)
    for path in _newest_first(root):
        _discard(root, path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _newest_first(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    tagged = [(step_of(path.name), path) for path in root.iterdir() if path.is_dir()]
    known = [(step, path) for step, path in tagged if step is not None]
    return [path for _, path in sorted(known, reverse=True)]


def _read_latest(root: Path) -> str | None:
    try:
        return (root / "latest").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _discard(root: Path, path: Path) -> None:
    """Rename first: a kill in the middle of a removal must not leave a half-empty checkpoint."""
    trash = root / REMOVING
    if trash.exists():
        shutil.rmtree(trash)
    path.rename(trash)
    shutil.rmtree(trash)
