"""Join datasets into one, by copying files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastllm_data.errors import UserError
from fastllm_data.file_copy import append_range
from fastllm_data.indexed_dataset import DTYPES, HEADER, MAGIC, IndexedDataset
from fastllm_data.output import WHERE_TO_WRITE, Target, read_sidecar, sha256_file, write_json

COPY_ITEMS = 1 << 20


def merge(prefixes: Sequence[Path], out: Path, *, force: bool = False) -> IndexedDataset:
    """Write ``out`` with the sequences and documents of all, in order; each is checked first.

    The result is what one run over all the inputs writes. The .bin files are copied by the kernel
    (copy_file_range: shared blocks where the file system can). If every part has a sidecar, so has
    the result. Raises UserError if the token types or the tokenizers differ, or ``out`` exists.
    """
    target = Target(out, out.with_name(out.name + ".merging"))
    if target.exists() and not force:
        raise UserError(f"{out} exists", "--force replaces it")
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    types = {part.dtype.name for part in parts}
    if len(types) != 1:
        raise UserError(f"the datasets hold different token types: {', '.join(sorted(types))}")
    metas = [read_sidecar(prefix) for prefix in prefixes]
    known = [meta for meta in metas if meta is not None]
    _check_tokenizers(prefixes, metas)
    try:
        target.work.mkdir(parents=True, exist_ok=True)
        with target.work_file(".bin").open("wb") as file:
            for part in parts:
                append_range(part.bin_path, file, 0, part.tokens.nbytes)
            file.flush()
            os.fsync(file.fileno())
        write_index(parts, target.work_file(".idx"))
        if len(known) == len(metas):
            write_json(target.work_file(".meta.json"), _joined(prefixes, parts, known, target))
        else:
            target.file(".meta.json").unlink(missing_ok=True)  # it would describe the old dataset
        target.publish()
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror or error}", WHERE_TO_WRITE
        ) from error
    finally:
        shutil.rmtree(target.work, ignore_errors=True)
    return IndexedDataset(out)


def _check_tokenizers(prefixes: Sequence[Path], metas: list[dict[str, Any] | None]) -> None:
    found: dict[str, str] = {}
    for prefix, meta in zip(prefixes, metas, strict=True):
        if meta is not None:
            tokenizer = meta["tokenizer"]
            found.setdefault(str(tokenizer.get("sha256")), f"{prefix} with {tokenizer.get('file')}")
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise UserError(
            f"the datasets were made with different tokenizers: {first}, {second}",
            "their ids mean different things; tokenize one of them again",
        )


def _joined(
    prefixes: Sequence[Path],
    parts: Sequence[IndexedDataset],
    metas: list[dict[str, Any]],
    target: Target,
) -> dict[str, Any]:
    """The sidecar of the whole from those of the parts."""
    counts: dict[str, int] = {}
    for meta in metas:
        counts = {n: int(c) + counts.get(n, 0) for n, c in meta["counts"].items()}
    options = [meta.get("options") for meta in metas]
    same = all(one == options[0] for one in options)
    return {
        **metas[0],
        "job": None,
        "options": options[0] if same else options,
        "encoder": " and ".join(sorted({str(meta.get("encoder")) for meta in metas})),
        "verified_samples": sum(int(meta.get("verified_samples", 0)) for meta in metas),
        "inputs": [source for meta in metas for source in meta.get("inputs", [])],
        "merged": [str(prefix) for prefix in prefixes],
        "counts": counts,
        "dataset": {
            "documents": sum(part.documents for part in parts),
            "sequences": sum(len(part) for part in parts),
            "tokens": sum(len(part.tokens) for part in parts),
        },
        "sha256": {
            suffix[1:]: sha256_file(target.work_file(suffix)) for suffix in (".bin", ".idx")
        },
    }


def write_index(parts: Sequence[IndexedDataset], path: Path) -> None:
    """The .idx of all sequences and documents of ``parts``, in order."""
    dtype = parts[0].dtype
    code = next(code for code, known in DTYPES.items() if known == dtype)
    sequences = sum(len(part) for part in parts)
    boundaries = 1 + sum(part.documents for part in parts)
    with path.open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, code, sequences, boundaries))
        for part in parts:
            for first in range(0, len(part), COPY_ITEMS):
                file.write(part.lengths[first : first + COPY_ITEMS].tobytes())
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
