"""Tensor-parallel ranks → canonical tensors, one pipeline chunk at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import check_names
from fastllm_convert.errors import UserError
from fastllm_convert.layouts import Row
from fastllm_convert.sharding import is_vocabulary, whole
from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params


class RankMerge:
    """Collects canonical tensors. ``equal``: replicated tensors that all ranks must agree on.

    ``expert_tp``: over how many ranks an expert is split; 1 means that each holds it whole.
    """

    def __init__(
        self, spec: ArchSpec, tp: int, padded_rows: int, where: str, *, expert_tp: int | None = None
    ) -> None:
        self.spec, self.tp, self.where = spec, tp, where
        self.padded_rows = padded_rows
        self._expert_tp = tp if expert_tp is None else expert_tp
        self.equal: list[tuple[str, Array, Array]] = []
        self._params: dict[str, ParamSpec] = {p.name: p for p in iter_params(spec)}
        self._found: dict[str, Array] = {}
        self._heads: list[Array] = []

    def add(
        self,
        rows: Sequence[Row],
        ranks: Sequence[Mapping[str, Array]],
        *,
        tied_head: Sequence[str] = (),
    ) -> None:
        """``rows`` name everything that every rank of ``ranks`` may hold, and must.

        What an earlier call brought already (expert-parallel ranks repeat all but the experts)
        must be equal.
        """
        for rank, tensors in enumerate(ranks):
            where = f"{self.where}, tensor rank {rank}" if self.tp > 1 else self.where
            check_names(tensors, [r.name for r in rows], where, optional=frozenset(tied_head))
        for row in rows:
            self._add_row(row, [t[row.name] for t in ranks])
        for name in tied_head:
            if all(name in t for t in ranks):
                self._heads.append(self._cut(whole([t[name] for t in ranks], 0)))

    def _add_row(self, row: Row, shards: Sequence[Array]) -> None:
        try:
            split = [row.how.split(s) for s in shards]
            for index, name in enumerate(row.canonical):
                param = self._params[name]
                parts = [s[index] for s in split]
                axis = param.tp_axis
                if param.expert is not None and self._expert_tp == 1:
                    axis = None
                if axis is None:
                    self.equal += [
                        (f"{name} of tensor ranks 0 and {i}", parts[0], p)
                        for i, p in enumerate(parts)
                        if i
                    ]
                self._keep(name, param, whole(parts, axis))
        except (ValueError, IndexError) as error:
            shape = list(shards[0].shape)
            raise UserError(f"{self.where}: {row.name!r} of shape {shape}: {error}") from None

    def _keep(self, name: str, param: ParamSpec, merged: Array) -> None:
        array = self._cut(merged) if is_vocabulary(param) else merged
        if name in self._found:
            self.equal.append((f"{name} of two expert ranks", self._found[name], array))
        self._found[name] = array

    def _cut(self, array: Array) -> Array:
        """Drop vocabulary padding, by the true size (never by looking at the rows)."""
        if array.shape[0] != self.padded_rows:
            raise UserError(
                f"{self.where}: {array.shape[0]} vocabulary rows, "
                f"the embedding has {self.padded_rows}"
            )
        return array.slice(0, 0, self.spec.vocab)

    def finish(self) -> dict[str, Array]:
        """Everything collected; copies of a tied head must equal the embedding."""
        for head in self._heads:
            self._found["lm_head.weight"] = head
        return self._found
