"""Which engine trains a config: torch's own collectives, or DeepSpeed where it is needed.

Imports no framework: ``check`` and the rules between sections ask it. ``build_engine`` imports the
engine that it builds, and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fastllm_train.config import Config
    from fastllm_train.engine import Engine


def replicas(config: Config) -> int:
    """Ranks that hold the same weights and see other tokens."""
    return config.parallel.dp * config.parallel.cp


def cuts_states(config: Config) -> bool:
    """Whether the torch engine cuts masters and moments over replicas. ZeRO's stages are no more
    than a name where there is one replica: nothing is cut."""
    return config.parallel.zero_stage > 0 and replicas(config) > 1


def only_deepspeed(config: Config) -> str:
    """What ``config`` asks for that only DeepSpeed does, as ``section.key=value``; "" if
    nothing."""
    parallel = config.parallel
    if parallel.offload != "none":
        return f'parallel.offload="{parallel.offload}"'
    if config.precision.dtype == "fp16":
        return 'precision.dtype="fp16"'
    if parallel.zero_stage > 1 and replicas(config) > 1:
        return f"parallel.zero_stage={parallel.zero_stage}"
    if config.checkpoint.format == "deepspeed":
        return 'checkpoint.format="deepspeed"'
    return ""


def chosen_engine(config: Config) -> Literal["torch", "deepspeed"]:
    """``speed.engine``, with "auto" made out."""
    if config.speed.engine != "auto":
        return config.speed.engine
    return "deepspeed" if only_deepspeed(config) else "torch"


def splits_masters(config: Config) -> bool:
    """Whether a bf16 weight is the upper half of its fp32 master (``precision.masters``, with
    "auto" made out)."""
    precision = config.precision
    possible = precision.dtype == "bf16" and chosen_engine(config) == "torch"
    return possible and precision.masters != "whole"


def build_engine(config: Config, *arguments: Any) -> Engine:
    """The engine for ``config``; ``arguments`` as ``DeepSpeedEngine`` and ``TorchEngine`` take
    them. Collective."""
    if chosen_engine(config) == "torch":
        from fastllm_train.engine_torch import TorchEngine

        return TorchEngine(config, *arguments)
    from fastllm_train.engine_deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, *arguments)
