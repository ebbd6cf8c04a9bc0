"""One definition of an architecture, read by planner, trainer and converter. Stdlib only."""

from fastllm_planner.arch.hf_config import from_hf_config, read_hf_config, to_hf_config
from fastllm_planner.arch.params import (
    ParamSpec,
    count_active_params,
    count_params,
    iter_layer_params,
    iter_params,
)
from fastllm_planner.arch.presets import preset, preset_names
from fastllm_planner.arch.spec import (
    ArchError,
    ArchSpec,
    MlaSpec,
    MoeSpec,
    RopeSpec,
    spec_from_dict,
    spec_to_dict,
)

__all__ = [
    "ArchError",
    "ArchSpec",
    "MlaSpec",
    "MoeSpec",
    "ParamSpec",
    "RopeSpec",
    "count_active_params",
    "count_params",
    "from_hf_config",
    "iter_layer_params",
    "iter_params",
    "preset",
    "preset_names",
    "read_hf_config",
    "spec_from_dict",
    "spec_to_dict",
    "to_hf_config",
]
