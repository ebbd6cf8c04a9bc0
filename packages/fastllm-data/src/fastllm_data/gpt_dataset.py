"""Training samples of fixed length from an indexed dataset, in Megatron-Core's order.

The documents of a split are repeated for as many epochs as the samples need, shuffled, and read as
one stream of tokens; sample k covers ``seq_len`` tokens of it plus one label. Every index and every
sample equals what ``megatron.core.datasets.gpt_dataset.GPTDataset`` gives for the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastllm_core import SampleReader, count_tokens, gpt_indices
from fastllm_data.errors import UserError
from fastllm_data.index_cache import Arrays, load_or_build
from fastllm_data.indexed_dataset import HEADER, IndexedDataset, sha256

# A last epoch is shuffled apart when it contributes less than this share of its samples.
SEPARATE_FINAL_EPOCH_SHARE = 0.80


class Sample(TypedDict):
    """One training item; every array has ``seq_len`` elements but ``cu_seqlens``.

    cu_seqlens: only with ``SampleOptions.packed``: the rising boundaries of the documents' parts,
    from 0 to ``seq_len``, as attention kernels for sequences of varying length take them.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    cu_seqlens: NotRequired[NDArray[np.int32]]


@dataclass(frozen=True)
class SampleOptions:
    """How samples are cut and masked; the defaults are Megatron's for pre-training.

    extra_token: a sample's last label is the token after it, so samples overlap by one token.
    drop_last: leave out a last sample that is not full.
    pad_id: fills such a sample; -1, no token, becomes 0 with no loss.
    eod_id: needed by the next two. eod_mask_loss: no loss where the input is EOD.
    reset_position_ids: positions restart after each EOD.
    packed: documents are told apart by the index, whether they end with EOD or not: samples have
    ``cu_seqlens``, positions restart with each document, and a label that is another document's
    first token has no loss.
    """

    extra_token: bool = True
    drop_last: bool = True
    pad_id: int = -1
    eod_id: int | None = None
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    packed: bool = False


@dataclass(frozen=True)
class SamplePlan:
    """How many epochs and samples there are, and which samples are shuffled together."""

    epochs: int
    samples: int
    separate_final_epoch: bool
    first_part: int  # samples shuffled together; the rest (the final epoch) apart


def plan_samples(
    tokens_per_epoch: int, seq_len: int, num_samples: int | None, options: SampleOptions
) -> SamplePlan:
    """Megatron-Core's arithmetic for the number of epochs and samples."""
    extra = int(options.extra_token)
    epochs = 1
    if num_samples is not None:
        needed = num_samples * seq_len + extra
        epochs = max(1, -(-needed // tokens_per_epoch))
    before_final = ((epochs - 1) * tokens_per_epoch - extra) // seq_len
    separate = False
    if epochs > 1:
        assert num_samples is not None
        from_final = num_samples - before_final
        per_epoch = (tokens_per_epoch - extra) // seq_len
        separate = from_final < int(SEPARATE_FINAL_EPOCH_SHARE * per_epoch)
    available = epochs * tokens_per_epoch - extra
    if options.drop_last:
        samples = available // seq_len
    else:
        # Megatron divides in C float; above 2^24 tokens that rounds, and so must we.
        samples = int(np.ceil(np.float32(available) / np.float32(seq_len)))
    return SamplePlan(epochs, samples, separate, before_final if separate else samples)


class GPTDataset:
    """``len(ds)`` samples of ``seq_len`` tokens; ``ds[i]`` is a Sample.

    documents: numbers (int32) of the sequences of ``indexed`` to draw from.
    num_samples: how many samples are needed; epochs are added until there are that many (there may
    be more). None: one epoch.
    seed: of the shuffles, 0 to 2^32 - 1. The order depends on nothing else.
    cache_dir: where the indices are kept between runs and shared between processes; None: nowhere.

    Can be pickled, for worker processes: files are mapped again there, and so are cached indices.
    Raises UserError if there are not enough tokens for one sample.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        documents: NDArray[np.int32],
        seq_len: int,
        num_samples: int | None,
        seed: int,
        options: SampleOptions | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.indexed = indexed
        self.seq_len = seq_len
        self.options = SampleOptions() if options is None else options
        if self.options.eod_id is None and (
            self.options.eod_mask_loss or self.options.reset_position_ids
        ):
            raise UserError("eod_mask_loss and reset_position_ids need eod_id")
        if indexed.dtype.name not in ("uint16", "int32"):
            raise UserError(
                f"{indexed.idx_path}: {indexed.dtype.name} tokens; only uint16 and int32 train"
            )
        lengths = np.array(indexed.lengths)  # an aligned copy
        documents = np.ascontiguousarray(documents, dtype=np.int32)
        total = count_tokens(lengths, documents)
        if total == 0 or (num_samples is None and total <= int(self.options.extra_token)):
            raise UserError(
                f"{indexed.prefix}: {len(documents)} documents with {total} tokens: not one sample",
                "give this split a larger share, or more data",
            )
        self.plan = plan_samples(total, seq_len, num_samples, self.options)
        if self.plan.samples < 1:
            raise UserError(
                f"{indexed.prefix}: {total} tokens are fewer than one sample of {seq_len}",
                "give this split a larger share, more data, or a shorter seq_len",
            )
        arguments: dict[str, Any] = {
            "epochs": self.plan.epochs,
            "separate": self.plan.separate_final_epoch,
            "seq_length": seq_len,
            "extra": int(self.options.extra_token),
            "samples": self.plan.samples,
            "first_part": self.plan.first_part,
            "seed": seed,
        }

        def build() -> Arrays:
            made: tuple[NDArray[Any], ...] = gpt_indices(
                lengths=lengths,
                documents=documents,
                **arguments,
            )
            return dict(zip(("document_index", "sample_index", "shuffle_index"), made, strict=True))

        folder = None if cache_dir is None else Path(cache_dir)
        contents = {} if folder is None else {
            "lengths": indexed.lengths_sha256, "documents": sha256(documents)
        }  # fmt: skip
        self._indices = load_or_build(folder, {"kind": "gpt", **contents, **arguments}, build)
        self._reader = self._open_reader()

    def _open_reader(self) -> SampleReader:
        options = self.options
        return SampleReader(
            idx=self.indexed.index_bytes,
            bin=self.indexed.data_bytes,
            header_bytes=HEADER.size,
            sequences=len(self.indexed),
            item_size=self.indexed.dtype.itemsize,
            document_index=self.document_index,
            sample_index=self.sample_index,
            shuffle_index=self.shuffle_index,
            seq_length=self.seq_len,
            extra=int(options.extra_token),
            pad_id=options.pad_id,
            eod_id=-1 if options.eod_id is None else options.eod_id,
            eod_mask_loss=options.eod_mask_loss,
            reset_position_ids=options.reset_position_ids,
            packed=options.packed,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reader = self._open_reader()

    @property
    def document_index(self) -> NDArray[np.int32]:
        """Sequence numbers, epoch after epoch, in the order in which their tokens are read."""
        return self._indices["document_index"]

    @property
    def sample_index(self) -> NDArray[Any]:
        """Row k: where sample k starts: position in document_index, token in that document."""
        return self._indices["sample_index"]

    @property
    def shuffle_index(self) -> NDArray[Any]:
        """The number of the sample that is item i."""
        return self._indices["shuffle_index"]

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, i: int) -> Sample:
        tokens, labels, loss_mask, position_ids, *packed = self._reader.read(i)
        sample = Sample(
            tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=position_ids
        )
        if packed:
            sample["cu_seqlens"] = packed[0]
        return sample
