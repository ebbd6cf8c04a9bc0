"""Find what is wrong with a dataset on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllm_data.errors import UserError
from fastllm_data.indexed_dataset import IndexedDataset
from fastllm_data.output import sha256_file

CHECK_TOKENS = 1 << 22


@dataclass
class Verdict:
    """``problems`` is empty if nothing is wrong; ``checked`` says what was looked at."""

    prefix: str
    checked: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **self.__dict__}


def verify(prefix: Path, vocab_size: int | None = None) -> Verdict:
    """Check the index, the token ids, and the checksums of the sidecar if there is one.

    Raises UserError only if there is no dataset to look at.
    """
    verdict = Verdict(str(prefix))
    for suffix in (".idx", ".bin"):
        path = prefix.with_name(prefix.name + suffix)
        if not path.is_file():
            raise UserError(
                f"{path}: no such file", "give the prefix: the path without .bin or .idx"
            )
    meta = _sidecar(prefix, verdict)
    try:
        dataset = IndexedDataset(prefix)
    except UserError as error:
        verdict.problems.append(str(error))
        return verdict
    verdict.checked.append("index: header, lengths, offsets, document boundaries, file sizes")
    vocab = vocab_size
    if vocab is None and meta is not None:
        vocab = int(meta["tokenizer"]["vocab_size"])
    _check_ids(dataset, vocab, verdict)
    if meta is not None:
        _check_against(dataset, meta, verdict)
    return verdict


def _sidecar(prefix: Path, verdict: Verdict) -> dict[str, Any] | None:
    path = prefix.with_name(prefix.name + ".meta.json")
    if not path.exists():
        verdict.notes.append(f"{path}: no sidecar, so no checksum to compare with")
        return None
    try:
        meta: Any = json.loads(path.read_bytes())
        for key in ("tokenizer", "sha256", "counts", "dtype"):
            meta[key]
        int(meta["tokenizer"]["vocab_size"])
        return meta
    except (ValueError, KeyError, TypeError) as error:
        verdict.problems.append(f"{path}: not a sidecar of fastllm-data: {error!r}")
        return None


def _check_ids(dataset: IndexedDataset, vocab: int | None, verdict: Verdict) -> None:
    if vocab is None:
        verdict.notes.append("vocabulary size unknown: token ids not checked against it")
    for first in range(0, len(dataset.tokens), CHECK_TOKENS):
        part = dataset.tokens[first : first + CHECK_TOKENS]
        wrong = part < 0
        if vocab is not None:
            wrong = wrong | (part >= vocab)
        if wrong.any():
            at = first + int(wrong.argmax())
            verdict.problems.append(
                f"{dataset.bin_path}: byte {at * dataset.dtype.itemsize}: id {dataset.tokens[at]} "
                f"is not in the vocabulary of {vocab}"
            )
            return
    if vocab is not None:
        verdict.checked.append(f"every token id is below {vocab}")


def _check_against(dataset: IndexedDataset, meta: dict[str, Any], verdict: Verdict) -> None:
    if dataset.dtype.name != meta["dtype"]:
        verdict.problems.append(
            f"{dataset.idx_path}: byte 17: dtype {dataset.dtype.name}, "
            f"the sidecar says {meta['dtype']}"
        )
    for path, name in ((dataset.bin_path, "bin"), (dataset.idx_path, "idx")):
        if sha256_file(path) != meta["sha256"].get(name):
            verdict.problems.append(f"{path}: content does not match the checksum in the sidecar")
    verdict.checked.append("checksums of .bin and .idx")
