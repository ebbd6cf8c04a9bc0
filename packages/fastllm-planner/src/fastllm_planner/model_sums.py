"""Parameter counts per layer kind and parallel axis, summed once per architecture.

Everything downstream (memory, time, search) multiplies these sums, so that evaluating a layout
never walks over the tensors again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastllm_planner.arch import ArchSpec, iter_layer_params, iter_params


@dataclass(frozen=True)
class LayerSums:
    """Parameters of one layer: split by tensor parallelism, replicated, and in experts."""

    split: int
    replicated: int
    experts: int

    def held(self, tp: int, ep: int) -> float:
        """Parameters that one rank holds."""
        return self.split / tp + self.replicated + self.experts / (tp * ep)

    @property
    def total(self) -> int:
        return self.split + self.replicated + self.experts


@dataclass(frozen=True)
class ModelSums:
    """A model as two kinds of layer plus its ends. ``dense_layers`` come first."""

    dense: LayerSums
    moe: LayerSums | None
    dense_layers: int
    layers: int
    embedding: int
    positions: int
    final_norm: int
    head: int
    tied: bool
    total: int

    @property
    def largest_layer(self) -> int:
        return max(self.dense.total if self.dense_layers else 0, self.moe.total if self.moe else 0)

    def held(self, tp: int, ep: int) -> float:
        """Parameters one rank holds of all layers together, embeddings and head left out."""
        return self.held_by_layers(0, self.layers, tp, ep)

    def held_by_layers(self, first: int, count: float, tp: int, ep: int) -> float:
        """Parameters one rank holds of ``count`` layers that start at layer ``first``."""
        if self.moe is None:
            return count * self.dense.held(tp, ep)
        dense = min(max(self.dense_layers - first, 0), count)
        return dense * self.dense.held(tp, ep) + (count - dense) * self.moe.held(tp, ep)


def _layer_sums(spec: ArchSpec, layer: int) -> LayerSums:
    split = replicated = experts = 0
    for param in iter_layer_params(spec, layer):
        if param.expert is not None:
            experts += param.numel
        elif param.tp_axis is None:
            replicated += param.numel
        else:
            split += param.numel
    return LayerSums(split, replicated, experts)


@lru_cache(maxsize=256)
def model_sums(spec: ArchSpec) -> ModelSums:
    """The sums of an architecture (cached: a spec is hashable)."""
    moe = spec.moe
    dense_layers = spec.layers if moe is None else min(moe.first_dense_layers, spec.layers)
    moe_layers = spec.layers - dense_layers
    dense = _layer_sums(spec, 0) if dense_layers else LayerSums(0, 0, 0)
    moe_sums = _layer_sums(spec, dense_layers) if moe_layers else None
    ends = {"embedding": 0, "position_embedding": 0, "norm": 0, "head": 0}
    for param in iter_params(_without_layers(spec)):
        if param.stage != "layer":
            ends[param.role] += param.numel
    layers = dense_layers * dense.total + (moe_layers * moe_sums.total if moe_sums else 0)
    head = 0 if spec.tied_embeddings else ends["head"]
    outside = ends["embedding"] + ends["position_embedding"] + ends["norm"] + head
    return ModelSums(
        dense=dense,
        moe=moe_sums,
        dense_layers=dense_layers,
        layers=spec.layers,
        embedding=ends["embedding"],
        positions=ends["position_embedding"],
        final_norm=ends["norm"],
        head=ends["head"],
        tied=spec.tied_embeddings,
        total=layers + outside,
    )


def _without_layers(spec: ArchSpec) -> ArchSpec:
    """The same model with one dense layer: its ends without walking over all experts."""
    from dataclasses import replace

    ffn = max(spec.ffn_hidden, 1)
    return replace(spec, layers=1, moe=None, ffn_hidden=ffn)


def vocab_rows(spec: ArchSpec, tp: int) -> float:
    """Vocabulary rows per rank; Megatron pads to a multiple of 128*tp."""
    return float(-(-spec.vocab // (128 * tp)) * 128)
