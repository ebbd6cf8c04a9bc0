"""Master weights and optimizer moments out of, and into, a DeepSpeed engine, one whole parameter at
a time, whatever the ZeRO stage.

ZeRO keeps flat fp32 partitions, which torch's optimizer updates. Reading goes through DeepSpeed's
public ``safe_get_full_*``. Writing into ZeRO-3 goes through ``safe_set_local_*``: its
``safe_set_full_*`` (0.19) cuts an unpadded value and fails where sizes do not divide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from fastllm_train.deepspeed_nvme import by_sub_group, resident

T = TypeVar("T")
# Of DeepSpeed's DynamicLossScaler: what changes from step to step.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class EngineStates:
    """Access to ``engine``'s states. ``keys``: the optimizer's moments, by torch's names."""

    def __init__(self, engine: Any, stage: int, keys: Sequence[str]) -> None:
        self._engine, self._stage, self._keys = engine, stage, tuple(keys)
        # Without ZeRO the engine's optimizer is torch's own; with it, a wrapper around that.
        self._torch_optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
        self._nvme = bool(getattr(engine.optimizer, "swap_optimizer", False))

    def weight(self, param: torch.nn.Parameter) -> torch.Tensor:
        """Whole fp32 master weight (of this tensor-parallel rank's part). Collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        value = param if self._stage == 0 else safe_get_full_fp32_param(param)
        assert value is not None
        return value.detach().float().reshape(_shape(param))

    def moments(self, param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Whole fp32 moments. Collective. Needs a step to have been taken and ``link``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: dict[str, torch.Tensor] = {}
        for key in self._keys:
            if self._stage == 0:
                value = self._torch_optimizer.state[param][key]
            else:
                value = safe_get_full_optimizer_state(param, key)
            assert value is not None
            found[key] = value.detach().float().reshape(_shape(param))
        return found

    def link(self) -> None:
        """Tie parameters to the optimizer's states; before reading or writing moments.

        ZeRO-1 and 2 do it themselves, once, after the first parameter group's first step: a second
        group has no state then and stays untied (DeepSpeed 0.19).
        """
        if self._keys and not self._torch_optimizer.state:
            self.begin_restore(0)  # every step so far was left out: nothing is there yet
        if self._stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def begin_restore(self, optimizer_steps: int) -> None:
        """Make the states that torch would make in its first step, with the step count set."""
        if not self._keys:
            return
        for index, tensor in enumerate(self._updated_tensors()):
            with self._resident(index, write=True):
                self._begin(tensor, float(optimizer_steps))
        self.link()

    def _begin(self, tensor: torch.Tensor, steps: float) -> None:
        state = self._torch_optimizer.state[tensor]
        if state and self._nvme:  # DeepSpeed's files are of these very tensors
            for key in self._keys:
                state[key].zero_()
            state["step"].fill_(steps)
            return
        self._torch_optimizer.state[tensor] = {
            "step": torch.tensor(steps, device=tensor.device),
            **{key: torch.zeros_like(tensor) for key in self._keys},
        }

    def visit(
        self, parameters: Iterable[tuple[T, torch.nn.Parameter]], *, write: bool = False
    ) -> Iterator[tuple[T, torch.nn.Parameter]]:
        """``parameters`` in an order in which their states are quick to read or, with ``write``, to
        set: while a pair is visited, what it needs is in memory."""
        if self._nvme:
            return by_sub_group(self._engine.optimizer, parameters, write=write)
        return iter(parameters)

    def _resident(self, sub_group: int, *, write: bool) -> AbstractContextManager[None]:
        if self._nvme:
            return resident(self._engine.optimizer, sub_group, write=write)
        return nullcontext()

    def never_give_up_scaling(self) -> None:
        """At the smallest loss scale DeepSpeed would raise; the run's own judge decides."""
        scaler = self._scaler()
        if scaler is not None:
            scaler.raise_error_at_min_scale = False

    @property
    def loss_scale(self) -> float | None:
        """What the loss is multiplied by; None where it is not scaled (all but fp16)."""
        scaler = self._scaler()
        return None if scaler is None else float(scaler.cur_scale)

    def loss_scaler_state(self) -> dict[str, float]:
        """JSON-ready; empty where the loss is not scaled."""
        scaler = self._scaler()
        return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALER}

    def restore_loss_scaler(self, values: Mapping[str, float]) -> None:
        """What ``loss_scaler_state`` gave; a state of another precision changes nothing."""
        scaler = self._scaler()
        for key in _SCALER if scaler is not None and values else ():
            setattr(scaler, key, values[key])

    def _scaler(self) -> Any:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    def restore(
        self, param: torch.nn.Parameter, weight: torch.Tensor, moments: Mapping[str, torch.Tensor]
    ) -> None:
        """Set the master weight and the moments. The model's own copy must be set already."""
        values = {None: weight, **moments}
        for key, value in values.items():
            if self._stage == 0:
                target = param.data if key is None else self._torch_optimizer.state[param][key]
                target.copy_(value)
            elif self._stage == 3:
                self._set_local(param, key, value)
            else:
                param.set_full_hp_param(value, key)  # type: ignore[attr-defined]

    def _set_local(self, param: Any, key: str | None, value: torch.Tensor) -> None:
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        local = safe_get_local_fp32_param(param)
        assert local is not None
        size = local.numel()
        rank = torch.distributed.get_rank(param.ds_process_group)
        world = torch.distributed.get_world_size(param.ds_process_group)
        flat = F.pad(value.flatten(), (0, size * world - value.numel()))
        mine = flat.narrow(0, size * rank, size)
        if key is None:
            safe_set_local_fp32_param(param, mine)
        else:
            safe_set_local_optimizer_state(param, mine, key)

    def _updated_tensors(self) -> list[torch.Tensor]:
        """What torch's optimizer updates on this rank: parameters, or flat partitions of them."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._torch_optimizer.param_groups for p in group["params"]]


def _shape(param: torch.nn.Parameter) -> torch.Size:
    return getattr(param, "ds_shape", param.shape)
