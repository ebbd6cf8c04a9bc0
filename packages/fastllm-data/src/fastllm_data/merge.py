"""Join datasets into one, by copying files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastllm_data.errors import UserError
from fastllm_data.indexed_dataset import DTYPES, HEADER, MAGIC, IndexedDataset
from fastllm_data.output import Target

COPY_ITEMS = 1 << 20


def merge(prefixes: Sequence[Path], out: Path, *, force: bool = False) -> IndexedDataset:
    """Write ``out`` with the sequences and documents of all, in order; each is checked first.

    The result is what one run over all the inputs writes. The .bin files are copied by the kernel
    (copy_file_range: shared blocks where the file system can). Raises UserError if the token types
    differ or ``out`` exists.
    """
    target = Target(out, out.with_name(out.name + ".merging"))
    if target.exists() and not force:
        raise UserError(f"{out} exists", "--force replaces it")
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    types = {part.dtype.name for part in parts}
    if len(types) != 1:
        raise UserError(f"the datasets hold different token types: {', '.join(sorted(types))}")
    try:
        target.work.mkdir(parents=True, exist_ok=True)
        with target.work_file(".bin").open("wb") as file:
            for part in parts:
                _append(part.bin_path, file)
            file.flush()
            os.fsync(file.fileno())
        _write_index(parts, target.work_file(".idx"))
        target.file(".meta.json").unlink(missing_ok=True)  # it would describe the old dataset
        target.publish()
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(target.work, ignore_errors=True)
    return IndexedDataset(out)


def _append(path: Path, out: BinaryIO) -> None:
    """Append a whole file."""
    out.flush()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        # Where the file systems cannot do this, the bytes that are left go through this process.
        with contextlib.suppress(OSError):
            while left > 0:
                copied = os.copy_file_range(file.fileno(), out.fileno(), left)
                if copied == 0:
                    break
                left -= copied
        file.seek(-left, os.SEEK_END)
        out.seek(0, os.SEEK_END)
        shutil.copyfileobj(file, out, 1 << 20)


def _write_index(parts: Sequence[IndexedDataset], path: Path) -> None:
    dtype = parts[0].dtype
    code = next(code for code, known in DTYPES.items() if known == dtype)
    sequences = sum(len(part) for part in parts)
    boundaries = 1 + sum(part.documents for part in parts)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, sequences, boundaries))
        for part in parts:
            file.write(part.lengths.tobytes())
        before = 0
        for part in parts:
            for first in range(0, len(part), COPY_ITEMS):
                file.write((part.offsets[first : first + COPY_ITEMS] + before).tobytes())
            before += part.tokens.nbytes
        file.write(np.zeros(1, "<i8").tobytes())
        before = 0
        for part in parts:
            for first in range(1, len(part.boundaries), COPY_ITEMS):
                file.write((part.boundaries[first : first + COPY_ITEMS] + before).tobytes())
            before += len(part)
        file.flush()
        os.fsync(file.fileno())
