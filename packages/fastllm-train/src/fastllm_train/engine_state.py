"""A rank's part of the training state, out of and into a layout-free checkpoint, for any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params
from fastllm_train.mesh import Mesh
from fastllm_train.portable import (
    PortableCheckpoint,
    WholeState,
    write_description,
    write_share,
)
from fastllm_train.tensor_parallel.apply import cut_to_rank, join_from_ranks

T = TypeVar("T")


class States(Protocol):
    """Master weights and moments of a rank's parameters, one at a time, fp32, of the shape that
    this tensor-parallel rank holds. Every method is collective over the replicas."""

    def visit(
        self, parameters: Iterable[tuple[T, nn.Parameter]], *, write: bool = False
    ) -> Iterator[tuple[T, nn.Parameter]]:
        """``parameters`` in an order in which their states are quick to read or, with ``write``, to
        set; the other methods are called of the pair that is visited."""
        ...

    def weight(self, param: nn.Parameter) -> torch.Tensor: ...

    def moments(self, param: nn.Parameter) -> dict[str, torch.Tensor]: ...

    def link(self) -> None:
        """Before moments are read."""
        ...

    def begin_restore(self, optimizer_steps: int) -> None:
        """Before ``restore``: how often the optimizer has stepped."""
        ...

    def restore(
        self, param: nn.Parameter, weight: torch.Tensor, moments: Mapping[str, torch.Tensor]
    ) -> None: ...


def named_by_spec(spec: ArchSpec, part: nn.Module) -> Iterator[tuple[ParamSpec, nn.Parameter]]:
    """The parameters that ``part`` holds, with what they are of the whole model."""
    by_name = {p.name: p for p in iter_params(spec)}
    return ((by_name[name], param) for name, param in part.named_parameters())


@dataclass(frozen=True)
class PartState:
    """``states`` of the parameters of ``part`` as whole tensors by canonical name. ``owners``: the
    rank that writes each; ``moments``: their names."""

    spec: ArchSpec
    mesh: Mesh
    device: torch.device
    part: nn.Module
    states: States
    owners: Mapping[str, int]
    moments: tuple[str, ...]

    def parameters(self) -> Iterator[tuple[ParamSpec, nn.Parameter]]:
        return named_by_spec(self.spec, self.part)

    def snapshot(self, state: Mapping[str, Any]) -> Callable[[Path], None]:
        """``Engine.snapshot``."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        share = [s for s in self._whole_states() if self.owners[s.name] == rank]

        def write(folder: Path) -> None:
            write_share(folder, share, rank, world_size)
            if rank == 0:
                write_description(folder, self.spec, state, self.owners, world_size)

        return write

    def restore(self, start: PortableCheckpoint) -> None:
        """Set weights and moments from a checkpoint."""
        self.states.begin_restore(start.state.get("optimizer_steps", start.state["step"]))
        for param, named in self.states.visit(self.parameters(), write=True):
            moments = {
                key: self._cut(param, value)
                for key, value in start.moments(param, self.moments).items()
            }
            self.states.restore(named, self._cut(param, start.weight(param)), moments)

    def master_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """``Engine.master_parameters``."""
        parameters = self.states.visit(self.parameters())
        held = {p.name: self._joined(p, self.states.weight(v)) for p, v in parameters}
        for param in iter_params(self.spec):
            if param.tied_to is None:
                whole = held.get(param.name)
                if whole is None:
                    whole = torch.empty(param.shape)
                if self.mesh.parallel.pp > 1 or self.mesh.parallel.ep > 1:
                    whole = whole.to(self.device)
                    dist.broadcast(whole, src=self.owners[param.name])
                yield param.name, whole.cpu()

    def _whole_states(self) -> Iterator[WholeState]:
        self.states.link()
        for param, named in self.states.visit(self.parameters()):
            weight = self._joined(param, self.states.weight(named))
            moments = self.states.moments(named)
            whole = {key: self._joined(param, value) for key, value in moments.items()}
            yield WholeState(param.name, weight, whole)

    def _cut(self, param: ParamSpec, whole: torch.Tensor) -> torch.Tensor:
        return cut_to_rank(self.spec, self.mesh, param, whole).to(self.device)

    def _joined(self, param: ParamSpec, part: torch.Tensor) -> torch.Tensor:
        return join_from_ranks(self.spec, self.mesh, param, part).cpu()
