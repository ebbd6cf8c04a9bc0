"""Several datasets drawn from as one, by weights or until all are spent, as in Megatron-Core."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastllm_core import blend, exhaustive_blend
from fastllm_data.errors import UserError
from fastllm_data.gpt_dataset import GPTDataset, Sample
from fastllm_data.index_cache import Arrays, load_or_build


class BlendedSample(Sample):
    """A Sample and the number of the dataset that it is from."""

    dataset_id: np.int16


class BlendedDataset:
    """Draws sample t from the dataset that is furthest behind its weight.

    weights: one per dataset, any positive scale; ``size``: how many samples. With ``weights`` None
    every sample of every dataset is drawn once, or, if ``size`` is given, the weights are the
    datasets' lengths. ``cache_dir``: where the indices are kept; None: nowhere.

    Raises UserError if a dataset has fewer samples than the blend would draw from it.
    """

    def __init__(
        self,
        datasets: Sequence[GPTDataset],
        weights: Sequence[float] | None,
        size: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.datasets = list(datasets)
        lengths = np.array([len(dataset) for dataset in self.datasets], dtype=np.int64)
        if weights is None and size is None:
            key: dict[str, Any] = {"kind": "exhaustive blend", "lengths": lengths.tolist()}

            def build() -> Arrays:
                return _named(exhaustive_blend(lengths))
        else:
            share = np.array(lengths if weights is None else weights, dtype=np.float64)
            if len(share) != len(lengths) or (share <= 0).any() or not np.isfinite(share).all():
                raise UserError("a blend needs one positive weight per dataset")
            total = int(lengths.sum())
            asked = total if size is None else size
            samples = min(asked, total) if weights is None else asked
            share = share / share.sum()
            key = {"kind": "blend", "weights": [w.hex() for w in share.tolist()], "size": samples}

            def build() -> Arrays:
                return _named(blend(share, samples))

        self._indices = load_or_build(None if cache_dir is None else Path(cache_dir), key, build)
        drawn = np.bincount(self.dataset_index, minlength=len(lengths))
        for j in np.flatnonzero(drawn > lengths).tolist():
            raise UserError(
                f"the blend draws {drawn[j]} samples from dataset {j}, which has {lengths[j]}",
                "ask for fewer samples, or lower its weight",
            )

    @property
    def dataset_index(self) -> NDArray[np.int16]:
        """The dataset that item i is from."""
        return self._indices["dataset_index"]

    @property
    def dataset_sample_index(self) -> NDArray[np.int64]:
        """The number of item i in its dataset."""
        return self._indices["dataset_sample_index"]

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> BlendedSample:
        j = self.dataset_index[i]
        sample = self.datasets[int(j)][int(self.dataset_sample_index[i])]
        return BlendedSample(dataset_id=j, **sample)


def _named(pair: tuple[NDArray[np.int16], NDArray[np.int64]]) -> Arrays:
    return {"dataset_index": pair[0], "dataset_sample_index": pair[1]}
