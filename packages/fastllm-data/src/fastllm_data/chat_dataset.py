"""Chats packed into training samples of fixed length, with the loss mask and document borders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from fastllm_core import pack_best_fit
from fastllm_data.errors import UserError
from fastllm_data.indexed_dataset import IndexedDataset

OVERLONG = ("error", "truncate", "drop")


class PackedSample(TypedDict):
    """One training item of ``seq_len`` positions.

    ``cu_seqlens`` (int32): where documents begin, then ``seq_len``; padding is the last document.
    Attention must not cross these borders; ``position_ids`` restart at each.
    ``loss_mask``: 1 where the label is learnt, else 0 (prompts, and padding).
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]


class ChatDataset:
    """Samples of what ``fastllm-data tokenize-chat --out PREFIX`` wrote; numpy only.

    A chat of n tokens takes n - 1 positions: each token but the last, with the next one as label.
    Chats are packed by best fit, so that few positions are padding; each stands in exactly one
    sample of an epoch, whole. ``overlong``: what becomes of chats with more than ``seq_len + 1``
    tokens: ``error``, ``truncate`` (their end is cut) or ``drop``.

    ``ds[i]`` is sample i of an endless stream: epoch ``i // len(ds)``, shuffled by ``seed`` and the
    epoch (None: not shuffled). It depends on nothing else, so resuming is ``ds[consumed]``.
    Raises UserError for files that do not belong together, and for overlong chats.
    """

    def __init__(
        self,
        prefix: str | Path,
        seq_len: int,
        *,
        seed: int | None = 0,
        overlong: str = "error",
        pad_id: int = 0,
    ) -> None:
        if overlong not in OVERLONG:
            raise UserError(f"overlong {overlong!r}: give one of {', '.join(OVERLONG)}")
        if seq_len < 1:
            raise UserError(f"seq_len {seq_len} must be positive")
        prefix = Path(prefix)
        self.seq_len = seq_len
        self.pad_id = pad_id
        self._seed = seed
        self.ids = IndexedDataset(prefix.with_name(f"{prefix.name}_chat_document"))
        self.mask = IndexedDataset(prefix.with_name(f"{prefix.name}_chat_mask"))
        _check_pair(self.ids, self.mask)
        space = np.array(self.ids.lengths) - 1
        self.overlong = int((space > seq_len).sum())
        if self.overlong and overlong == "error":
            raise UserError(
                f"{self.ids.prefix}: {self.overlong} chats have more than {seq_len + 1} tokens",
                "a larger seq_len, or overlong='truncate' or 'drop'",
            )
        space[space > seq_len] = seq_len if overlong == "truncate" else 0
        self._space = np.maximum(space, 0).astype(np.int32)
        self.items, self.ends = pack_best_fit(self._space, seq_len)
        if len(self.ends) == 0:
            raise UserError(f"{self.ids.prefix}: there is no chat to learn from")
        self._epoch = -1
        self._order: NDArray[np.int64] = np.arange(len(self.ends))

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.ends)

    @property
    def padding_share(self) -> float:
        """The share of positions that are padding."""
        return 1.0 - float(self._space.sum(dtype=np.int64)) / (len(self) * self.seq_len)

    def chats_of(self, pack: int) -> NDArray[np.int64]:
        """The numbers of the chats in a pack, in order."""
        return self.items[int(self.ends[pack - 1]) if pack else 0 : int(self.ends[pack])]

    def __getitem__(self, i: int) -> PackedSample:
        if i < 0:
            raise IndexError(f"sample {i}")
        epoch, at = divmod(i, len(self))
        if self._seed is not None and epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._order, self._epoch = generator.permutation(len(self)), epoch
        return self.pack(int(self._order[at]))

    def pack(self, pack: int) -> PackedSample:
        """The sample of a pack, without shuffling."""
        length = self.seq_len
        tokens = np.full(length, self.pad_id, dtype=np.int64)
        labels = np.full(length, self.pad_id, dtype=np.int64)
        loss_mask = np.zeros(length, dtype=np.float32)
        position_ids = np.empty(length, dtype=np.int64)
        borders = [0]
        for chat in self.chats_of(pack):
            begin, count = borders[-1], int(self._space[chat])
            end = begin + count
            ids: NDArray[Any] = self.ids.get(int(chat), 0, count + 1)
            tokens[begin:end] = ids[:-1]
            labels[begin:end] = ids[1:]
            loss_mask[begin:end] = self.mask.get(int(chat), 1, count)
            position_ids[begin:end] = np.arange(count)
            borders.append(end)
        if borders[-1] < length:
            position_ids[borders[-1] :] = np.arange(length - borders[-1])
            borders.append(length)
        return PackedSample(
            tokens=tokens,
            labels=labels,
            loss_mask=loss_mask,
            position_ids=position_ids,
            cu_seqlens=np.array(borders, dtype=np.int32),
        )


def _check_pair(ids: IndexedDataset, mask: IndexedDataset) -> None:
    if mask.dtype.name != "uint8":
        raise UserError(f"{mask.idx_path}: {mask.dtype.name}, but a loss mask is uint8")
    if not np.array_equal(ids.lengths, mask.lengths):
        raise UserError(f"{mask.idx_path}: its lengths are not those of {ids.idx_path}")
    if len(mask.tokens) and int(mask.tokens.max()) > 1:
        at = int((mask.tokens > 1).argmax())
        raise UserError(f"{mask.bin_path}: byte {at}: {mask.tokens[at]} is neither 0 nor 1")
