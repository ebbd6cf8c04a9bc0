"""Several datasets drawn from as one, by weights or until all are spent, as in Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastllm_core import blend, exhaustive_blend
from fastllm_data.errors import UserError
from fastllm_data.gpt_dataset import GPTDataset, Sample


class BlendedSample(Sample):
    """A Sample and the number of the dataset that it is from."""

    dataset_id: np.int16


class BlendedDataset:
    """Draws sample t from the dataset that is furthest behind its weight.

    weights: one per dataset, any positive scale; ``size``: how many samples. With ``weights`` None
    every sample of every dataset is drawn once, or, if ``size`` is given, the weights are the
    datasets' lengths.

    Raises UserError if a dataset has fewer samples than the blend would draw from it.
    """

    def __init__(
        self,
        datasets: Sequence[GPTDataset],
        weights: Sequence[float] | None,
        size: int | None = None,
    ) -> None:
        self.datasets = list(datasets)
        lengths = np.array([len(dataset) for dataset in self.datasets], dtype=np.int64)
        self.dataset_index: NDArray[np.int16]
        self.dataset_sample_index: NDArray[np.int64]
        if weights is None and size is None:
            pair = exhaustive_blend(lengths)
        else:
            share = np.array(lengths if weights is None else weights, dtype=np.float64)
            if len(share) != len(lengths) or (share <= 0).any() or not np.isfinite(share).all():
                raise UserError("a blend needs one positive weight per dataset")
            total = int(lengths.sum())
            if size is None:
                size = total
            elif weights is None:
                size = min(size, total)
            pair = blend(share / share.sum(), size)
        self.dataset_index, self.dataset_sample_index = pair
        drawn = np.bincount(self.dataset_index, minlength=len(lengths))
        for j in np.flatnonzero(drawn > lengths).tolist():
            raise UserError(
                f"the blend draws {drawn[j]} samples from dataset {j}, which has {lengths[j]}",
                "ask for fewer samples, or lower its weight",
            )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> BlendedSample:
        j = self.dataset_index[i]
        sample = self.datasets[int(j)][int(self.dataset_sample_index[i])]
        return BlendedSample(dataset_id=j, **sample)
