"""Training samples of fixed length from an indexed dataset, in Megatron-Core's order.

The documents of a split are repeated for as many epochs as the samples need, shuffled, and read as
one stream of tokens; sample k covers ``seq_len`` tokens of it plus one label. Every index and every
sample equals what ``megatron.core.datasets.gpt_dataset.GPTDataset`` gives for the same arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastllm_core import SampleReader, gpt_indices
from fastllm_data.errors import UserError
from fastllm_data.indexed_dataset import HEADER, IndexedDataset

# A last epoch is shuffled apart when it contributes less than this share of its samples.
SEPARATE_FINAL_EPOCH_SHARE = 0.80


class Sample(TypedDict):
    """One training item; every array has ``seq_len`` elements."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]


@dataclass(frozen=True)
class SampleOptions:
    """How samples are cut and masked; the defaults are Megatron's for pre-training.

    extra_token: a sample's last label is the token after it, so samples overlap by one token.
    drop_last: leave out a last sample that is not full.
    pad_id: fills such a sample; -1, no token, becomes 0 with no loss.
    eod_id: needed by the next two. eod_mask_loss: no loss where the input is EOD.
    reset_position_ids: positions restart after each EOD.
    """

    extra_token: bool = True
    drop_last: bool = True
    pad_id: int = -1
    eod_id: int | None = None
    eod_mask_loss: bool = False
    reset_position_ids: bool = False


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
        total = int(lengths[documents].sum(dtype=np.int64))
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
        self.document_index: NDArray[np.int32]
        self.sample_index: NDArray[Any]
        self.shuffle_index: NDArray[Any]
        self.document_index, self.sample_index, self.shuffle_index = gpt_indices(
            lengths=lengths,
            documents=documents,
            epochs=self.plan.epochs,
            separate=self.plan.separate_final_epoch,
            seq_length=seq_len,
            extra=int(self.options.extra_token),
            samples=self.plan.samples,
            first_part=self.plan.first_part,
            seed=seed,
        )
        self._reader = SampleReader(
            idx=indexed.index_bytes,
            bin=indexed.data_bytes,
            header_bytes=HEADER.size,
            sequences=len(indexed),
            item_size=indexed.dtype.itemsize,
            document_index=self.document_index,
            sample_index=self.sample_index,
            shuffle_index=self.shuffle_index,
            seq_length=seq_len,
            extra=int(self.options.extra_token),
            pad_id=self.options.pad_id,
            eod_id=-1 if self.options.eod_id is None else self.options.eod_id,
            eod_mask_loss=self.options.eod_mask_loss,
            reset_position_ids=self.options.reset_position_ids,
        )

    def __len__(self) -> int:
        return len(self.shuffle_index)

    def __getitem__(self, i: int) -> Sample:
        tokens, labels, loss_mask, position_ids = self._reader.read(i)
        return Sample(tokens=tokens, labels=labels, loss_mask=loss_mask, position_ids=position_ids)
