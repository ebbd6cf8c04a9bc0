"""Where output goes: names, the folder of unfinished work, and the sidecar file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm_data.errors import UserError

SUFFIXES = (".bin", ".idx", ".meta.json")
WHERE_TO_WRITE = "give a path in a folder that exists and can be written, with space left"


@dataclass(frozen=True)
class Target:
    """One dataset: ``prefix`` + .bin, .idx, .meta.json; written under ``work`` until complete."""

    prefix: Path
    work: Path

    def file(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def work_file(self, suffix: str) -> Path:
        return self.work / (self.prefix.name + suffix)

    def exists(self) -> bool:
        return any(self.file(suffix).exists() for suffix in SUFFIXES)

    def publish(self) -> None:
        """Give the complete files their names; the .idx last, as readers open it first.

        Files that have theirs already are passed over, so this can be done again after a kill.
        """
        for suffix in (".meta.json", ".bin", ".idx"):
            if self.work_file(suffix).exists():
                self.work_file(suffix).replace(self.file(suffix))


def targets_of(out: Path, keys: tuple[str, ...], level: str = "document") -> list[Target]:
    """Megatron's names: ``{out}_{key}_{level}``."""
    return [Target(out.with_name(f"{out.name}_{key}_{level}"), work_folder(out)) for key in keys]


def work_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def open_work_folder(out: Path, targets: list[Target], *, force: bool, resume: bool) -> Path:
    """Make the folder for unfinished output, or take the one that is there.

    Raises UserError if there is output, or unfinished output, that may not be touched.
    """
    work = work_folder(out)
    for target in targets:
        if target.exists() and not force and not (resume and work.exists()):
            raise UserError(f"{target.prefix} exists", "--force replaces it")
    if work.exists() and not (force or resume):
        raise UserError(
            f"{work} exists: a run is writing it, or was stopped",
            "--resume goes on with it, --force starts again",
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work}: {error.strerror}", WHERE_TO_WRITE) from error
    return work


def empty_folder(folder: Path) -> None:
    """Remove the files in a folder, but for its lock."""
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write beside the target, flush to disk, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_sidecar(prefix: Path) -> dict[str, Any] | None:
    """The sidecar of a dataset; None if there is none. Raises UserError if it is damaged."""
    path = prefix.with_name(prefix.name + ".meta.json")
    try:
        meta: Any = json.loads(path.read_bytes())
        for key in ("tokenizer", "sha256", "counts", "dtype"):
            meta[key]
        int(meta["tokenizer"]["vocab_size"])
        if not all(isinstance(meta[key], dict) for key in ("sha256", "counts")):
            raise TypeError("sha256 and counts must be objects")
        return meta
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a sidecar of fastllm-data: {error!r}") from error


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
