"""The unfinished files of ``tokenize-chat``: ids and mask grow together, and can be cut back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastllm_data.chat import EncodedChat
from fastllm_data.indexed_dataset import write_index
from fastllm_data.output import Target

LENGTHS_FILE = "lengths"  # int32 of each chat: what the indices will be made of


class ChatFiles:
    """Appends chats to two datasets of equal lengths.

    chats, tokens: where the files go on; what they hold after that is cut off. Use as a context
    manager, and ``finish`` when all chats are there.
    """

    def __init__(
        self, targets: tuple[Target, Target], ids_type: str, chats: int, tokens: int
    ) -> None:
        self._targets = targets
        self._types = (np.dtype(ids_type).newbyteorder("<"), np.dtype(np.uint8))
        self._lengths_path = targets[0].work / LENGTHS_FILE
        sizes = [tokens * kind.itemsize for kind in self._types]
        bins = [target.work_file(".bin") for target in targets]
        self._ids, self._mask = (
            _open_at(path, size) for path, size in zip(bins, sizes, strict=True)
        )
        self._lengths = _open_at(self._lengths_path, 4 * chats)

    def add(self, chat: EncodedChat) -> None:
        """Append a chat. Raises OverflowError for an id that does not fit the files' type."""
        ids, limits = np.asarray(chat.ids, dtype=np.int64), np.iinfo(self._types[0])
        if len(ids) and (ids.min() < 0 or ids.max() > limits.max):
            raise OverflowError(f"an id does not fit {self._types[0].name}")
        self._ids.write(ids.astype(self._types[0]).tobytes())
        self._mask.write(np.asarray(chat.weights, dtype=np.uint8).tobytes())
        self._lengths.write(np.int32(len(ids)).astype("<i4").tobytes())

    def sync(self) -> None:
        """Make what was added durable."""
        for file in (self._ids, self._mask, self._lengths):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write both indices."""
        self.sync()
        lengths = np.fromfile(self._lengths_path, dtype="<i4")
        boundaries = np.arange(len(lengths) + 1, dtype="<i8")
        for target, kind in zip(self._targets, self._types, strict=True):
            write_index(target.work_file(".idx"), kind, lengths, boundaries)

    def __enter__(self) -> ChatFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._ids, self._mask, self._lengths):
            file.close()


def _open_at(path: Path, size: int) -> BinaryIO:
    """For appending after its first ``size`` bytes. Raises OSError if it has fewer."""
    file = path.open("ab")
    if file.tell() < size:
        file.close()
        raise OSError(0, "shorter than when the run was stopped", str(path))
    file.truncate(size)
    return file
