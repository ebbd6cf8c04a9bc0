"""What is trained on ([data]) and in which order.

The order is a pure function of (seed, consumed samples): step after step takes the next
``batch.global`` samples of one seeded shuffle, and the layout only says which rank reads which of
them. So the samples of a step are the same for any data-parallel size, and resuming at any point
costs nothing. With a batch that grows (``batch.rampup``) its size, too, follows from the samples
consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fastllm_train.errors import UserError

if TYPE_CHECKING:
    from fastllm_train.layout import BatchConfig

Sample = Mapping[str, Any]  # of NDArray
VALIDATION_SEED = 1 << 32  # synthetic: other samples than any training seed's
FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class DataConfig:
    """``paths``: one prefix, or weight, prefix, weight, prefix, … of indexed datasets.

    ``source`` "chat" is instruction tuning on the one prefix that ``fastllm-data tokenize-chat``
    wrote: chats are packed into sequences and kept apart, only responses are learnt. ``overlong``:
    what becomes of chats longer than a sequence (``error``, ``truncate``, ``drop``).
    ``source`` "synthetic" needs no files: sequences that a model can learn, made from ``seed``
    (for benchmarks and for trying out a layout).
    ``workers`` processes of each rank read the next steps ahead (0: none).
    ``cache_dir``: a folder where the order of samples is kept for other ranks and later starts;
    empty: every process computes it for itself.
    """

    source: Literal["indexed", "chat", "synthetic"] = "indexed"
    paths: tuple[str, ...] = ()
    split: str = "949,50,1"
    tokenizer: str = ""
    seed: int = 1234
    overlong: Literal["error", "truncate", "drop"] = "error"
    workers: int = 1
    cache_dir: str = ""

    def __post_init__(self) -> None:
        if self.source == "synthetic" and self.paths:
            raise UserError('data.source="synthetic" takes no data.paths')
        if self.source == "chat" and len(self.paths) != 1:
            raise UserError(
                f'data.source="chat" takes one prefix in data.paths, not {len(self.paths)}',
                hint="the --out of fastllm-data tokenize-chat",
            )
        if self.seed < 0:
            raise UserError(f"data.seed={self.seed} is negative")
        if self.workers < 0:
            raise UserError(f"data.workers={self.workers} is negative")


class SampleSource(Protocol):
    """A fixed sequence of samples: item ``i`` never changes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample:
        """Arrays of FIELDS, each [seq_len]."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. ``tokens``, ``labels``, ``position_ids`` int64 and ``loss_mask`` float32,
    each [micro, seq_len]."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    position_ids: NDArray[np.int64]


class SyntheticSamples:
    """Sequences x[t+1] = (a*x[t] + b) mod vocab with a, b drawn per sample from a few values.

    The next token follows from the last two, so the loss falls well below ln(vocab).
    """

    def __init__(self, count: int, seq_len: int, vocab: int, seed: int) -> None:
        self._count, self._seq_len, self._vocab, self._seed = count, seq_len, vocab, seed

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        # Beyond the count, too: a run that skips samples reads on.
        if index < 0:
            raise IndexError(index)
        draw = np.random.default_rng((self._seed, index))
        factor, shift = (int(draw.integers(1, 4)), int(draw.integers(1, 4)))
        walk = np.empty(self._seq_len + 1, dtype=np.int64)
        walk[0] = draw.integers(self._vocab)
        for t in range(self._seq_len):
            walk[t + 1] = (factor * walk[t] + shift) % self._vocab
        return {
            "tokens": walk[:-1],
            "labels": walk[1:],
            "loss_mask": np.ones(self._seq_len, dtype=np.float32),
            "position_ids": np.arange(self._seq_len, dtype=np.int64),
        }


def rank_samples(consumed: int, batch: BatchConfig, dp: int, dp_rank: int) -> list[range]:
    """Sample indices of one rank for the step that starts at ``consumed``: one range a micro-batch.

    Micro-batch ``m`` of rank ``r`` holds samples ``consumed + (m*dp + r)*micro`` and on, so the
    ranks together take exactly ``consumed … consumed + batch.size_at(consumed) - 1``.
    """
    starts = (
        consumed + (index * dp + dp_rank) * batch.micro
        for index in range(batch.accumulation(dp, consumed))
    )
    return [range(start, start + batch.micro) for start in starts]


def read_step(
    source: SampleSource, consumed: int, batch: BatchConfig, dp: int, dp_rank: int, vocab: int
) -> list[MicroBatch]:
    """One rank's micro-batches of a step. ``UserError`` for a token outside the vocabulary."""
    return [
        stack([source[i] for i in part], vocab)
        for part in rank_samples(consumed, batch, dp, dp_rank)
    ]


def stack(samples: Sequence[Sample], vocab: int) -> MicroBatch:
    """Samples as one micro-batch. ``UserError`` for a token outside the vocabulary."""
    tokens, labels, loss_mask, position_ids = (
        np.stack([sample[name] for sample in samples]) for name in FIELDS
    )
    largest = int(max(tokens.max(), labels.max()))
    if largest >= vocab or min(tokens.min(), labels.min()) < 0:
        raise UserError(
            f"the data holds token {largest}, the model's vocabulary has {vocab} entries",
            hint="train with the tokenizer that the data was made with, or set the model's vocab",
        )
    return MicroBatch(
        tokens.astype(np.int64, copy=False),
        labels.astype(np.int64, copy=False),
        loss_mask.astype(np.float32, copy=False),
        position_ids.astype(np.int64, copy=False),
    )


class EpochSamples:
    """``count`` samples, epoch after epoch.

    Epoch ``e`` is shuffled on its own with ``seed + e``, so sample ``i`` depends on the data and
    the seed alone, not on how long the run will be. (Megatron shuffles a run's epochs together:
    training longer changes its order. Up to one epoch both give the same samples.)
    """

    def __init__(self, open_epoch: Callable[[int], SampleSource], count: int) -> None:
        self._open_epoch, self._count = open_epoch, count
        self._epoch, self._samples = 0, open_epoch(0)
        self.per_epoch = len(self._samples)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        epoch, within = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._samples = epoch, self._open_epoch(epoch)
        return self._samples[within]


def open_training_data(
    config: DataConfig, batch: BatchConfig, *, steps: int, vocab: int
) -> SampleSource:
    """The training samples of ``steps`` steps. ``UserError`` for missing or wrong files."""
    count = batch.samples_after(steps)
    if config.source == "synthetic":
        return SyntheticSamples(count, batch.seq_len, vocab, config.seed)
    if config.source == "chat":
        return ChatSamples(_open_chats(config, batch.seq_len), count)
    return EpochSamples(lambda epoch: _open_indexed(config, batch.seq_len, epoch), count)


def open_validation_data(
    config: DataConfig, batch: BatchConfig, *, samples: int, vocab: int
) -> SampleSource:
    """The validation split's samples, once through. ``UserError`` when there are none."""
    if config.source == "synthetic":
        return SyntheticSamples(samples, batch.seq_len, vocab, config.seed + VALIDATION_SEED)
    return _open_indexed(config, batch.seq_len, 0, split=1)


class ChatSamples:
    """``count`` samples of an endless, seeded stream of packed chats."""

    def __init__(self, chats: SampleSource, count: int) -> None:
        self._chats, self._count = chats, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        return self._chats[index]


def _open_chats(config: DataConfig, seq_len: int) -> SampleSource:
    import fastllm_data
    from fastllm_data import UserError as DataError

    chat_dataset: Any = getattr(fastllm_data, "ChatDataset", None)
    if chat_dataset is None:
        raise UserError(
            f"fastllm-data {fastllm_data.__version__} has no packed chats", hint="upgrade it"
        )
    try:
        return chat_dataset(config.paths[0], seq_len, seed=config.seed, overlong=config.overlong)
    except DataError as error:
        raise UserError(str(error), hint=error.hint) from error


def _open_indexed(config: DataConfig, seq_len: int, epoch: int, split: int = 0) -> SampleSource:
    """One epoch of a split: 0 training, 1 validation."""
    from fastllm_data import UserError as DataError
    from fastllm_data import build_datasets

    name, place = (("training", "first"), ("validation", "second"))[split]
    sizes = (None, 0, 0) if split == 0 else (0, None, 0)
    try:
        found = build_datasets(
            config.paths,
            config.split,
            seq_len,
            sizes,
            config.seed + epoch,
            config.cache_dir or None,
        )
    except DataError as error:
        raise UserError(str(error), hint=error.hint) from error
    samples = found[split]
    if samples is None:
        raise UserError(
            f"data.split={config.split!r} gives the {name} split no documents",
            hint=f'the {place} number is the {name} share, for example "949,50,1"',
        )
    return samples
