"""Find what is wrong with a dataset on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastllm_data.errors import UserError
from fastllm_data.indexed_dataset import HEADER, IndexedDataset
from fastllm_data.output import read_sidecar, sha256_file

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


def verify(prefix: Path, vocab_size: int | None = None, *, modes: bool = False) -> Verdict:
    """Check the index, the token ids, and the checksums of the sidecar if there is one.

    modes: a byte per sequence after the index is right, as Megatron's multimodal builders write.
    Raises UserError only if there is no dataset to look at.
    """
    verdict = Verdict(str(prefix))
    for suffix in (".idx", ".bin"):
        path = prefix.with_name(prefix.name + suffix)
        if not path.is_file():
            raise UserError(
                f"{path}: no such file", "give the prefix: the path without .bin or .idx"
            )
    meta = None
    try:
        meta = read_sidecar(prefix)
        if meta is None:
            verdict.notes.append(f"{prefix}.meta.json: no sidecar, so no checksum to compare with")
    except UserError as error:
        verdict.problems.append(str(error))
    try:
        dataset = IndexedDataset(prefix)
    except UserError as error:
        verdict.problems.append(str(error))
        return verdict
    verdict.checked.append("index: header, lengths, offsets, document boundaries, file sizes")
    _check_tail(dataset, modes, verdict)
    vocab = vocab_size
    if vocab is None and meta is not None:
        vocab = int(meta["tokenizer"]["vocab_size"])
    _check_ids(dataset, vocab, verdict)
    if meta is not None:
        _check_against(dataset, meta, verdict)
    return verdict


def _check_tail(dataset: IndexedDataset, modes: bool, verdict: Verdict) -> None:
    """The reader takes an index with sequence modes; in a text dataset they are stray bytes."""
    end = HEADER.size + 12 * len(dataset) + 8 * len(dataset.boundaries)
    extra = len(dataset.index_bytes) - end
    if extra and not modes:
        verdict.problems.append(
            f"{dataset.idx_path}: byte {end}: {extra} bytes after the index (one a sequence: "
            "multimodal modes? then give --modes)"
        )


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
                f"is not in the vocabulary{'' if vocab is None else f' of {vocab}'}"
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
