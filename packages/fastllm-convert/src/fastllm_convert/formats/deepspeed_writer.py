"""DeepSpeed checkpoints to write: weights that an engine loads with ``load_module_only=True``.

``deepspeed``: one file for the whole model, canonical names, as fastllm-train writes (ZeRO 0 to 2).
``megatron-deepspeed``: a file per pipeline layer and tensor rank, as Megatron-DeepSpeed writes; its
q, k, v rows are those of the code before 2024-12-04 (``interleaved``) unless asked otherwise.

No optimizer states are written: a conversion has none.
"""

from __future__ import annotations

from typing import Any

from fastllm_convert.checkpoint import Checkpoint
from fastllm_convert.dtypes import DType
from fastllm_convert.engine.plan import OutputFile, Plan, literal_file, sources_of
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_pickle_writer import Namespace, Ordered, Tensor
from fastllm_convert.files.torch_writer import torch_file
from fastllm_convert.formats.companions import companion_files, target_type
from fastllm_convert.formats.megatron_args import args_of
from fastllm_convert.formats.megatron_deepspeed import pipeline_tables
from fastllm_convert.formats.megatron_deepspeed_whole import files_to_write
from fastllm_convert.formats.megatron_names import QkvLayout, check_family
from fastllm_convert.formats.megatron_writer import Parallel, RankTensors, tokenizer_type
from fastllm_convert.sharding import check_tp, layer_ranges
from fastllm_planner.arch import iter_params

_TAG = "global_step0"


def _finish(source: Checkpoint, dtype: DType | None, files: list[OutputFile]) -> Plan:
    carried = companion_files(source, dtype)
    files = [*files, literal_file("latest", _TAG.encode())]
    files += [literal_file(name, content) for name, content in sorted(carried.files.items())]
    return Plan(
        files=files,
        sources=sources_of(list(source.tensors.values())),
        checked=source.checked,
        equal=source.equal,
        notes=[*source.notes, *carried.notes],
    )


def _engine_state(tp: int, pp: int) -> dict[str, Any]:
    """The keys that ``DeepSpeedEngine.load_checkpoint`` reads besides ``module``."""
    return {
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": 0,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": tp * pp,
        "checkpoint_parallel_dimensions": {"pp_degree": pp, "tp_degree": tp},
        "ds_config": {},
        "ds_version": "0.19.8",
    }


def plan(source: Checkpoint, *, dtype: DType | None) -> Plan:
    """The whole model in ``global_step0/mp_rank_00_model_states.pt``."""
    module: dict[str, Any] = {}
    shared: dict[str, str] = {}
    for param in iter_params(source.spec):
        if param.tied_to is not None:
            module[param.name] = module[param.tied_to]  # one storage, as torch saves tied weights
            shared[param.name] = param.tied_to
            continue
        array = source.tensors[param.name]
        module[param.name] = Tensor(array, target_type(array, dtype))
    state = {"module": Ordered(module), **_engine_state(1, 1), "shared_params": shared}
    return _finish(source, dtype, [torch_file(f"{_TAG}/mp_rank_00_model_states.pt", state)])


_MEGATRON_STATE = {"checkpoint_version": 3.0, "iteration": 0, "tokens": 0}


def _pipeline_args(
    source: Checkpoint, parallel: Parallel, dtype: DType | None, qkv: QkvLayout
) -> dict[str, Any]:
    spec = source.spec
    args = args_of(
        spec,
        tp=parallel.tp,
        pp=parallel.pp,
        vp=1,
        vocab_multiple=parallel.vocab_multiple,
        dtype=dtype or source.dtype,
        tokenizer=tokenizer_type(companion_files(source, dtype).files),
        legacy=True,
    )
    # Its code calls the norm "rmsnorm"; the later code is known by its FPDT argument.
    args |= {"normalization": "rmsnorm" if spec.norm == "rmsnorm" else "layernorm"}
    args |= {"ds_sequence_parallel_fpdt": False} if qkv == "concat" else {}
    if spec.moe is not None:
        args |= {"num_experts": [spec.moe.experts], "topk": spec.moe.active_experts}
        args |= {"enable_expert_tensor_parallelism": False, "no_pipeline_parallel": True}
    return args


def plan_pipeline(
    source: Checkpoint, *, parallel: Parallel, dtype: DType | None, qkv: QkvLayout
) -> Plan:
    """Layer files of any tensor-parallel size, and the ``mp_rank`` files that name the layout."""
    spec = source.spec
    check_family(spec)
    check_tp(spec, parallel.tp)
    layer_ranges(spec.layers, parallel.pp)
    if parallel.ep > 1:
        raise UserError(
            "Megatron-DeepSpeed stores every expert in a file of its own", hint="drop --ep"
        )
    if spec.moe is not None and parallel.pp > 1:
        raise UserError(
            "Megatron-DeepSpeed has no mixture of experts in pipeline stages", hint="use --pp 1"
        )
    tensors = RankTensors(source, parallel, dtype, expert_tp=1)
    args = _pipeline_args(source, parallel, dtype, qkv)
    if spec.moe is not None:
        state = {
            **_engine_state(parallel.tp, 1),
            **_MEGATRON_STATE,
            "num_experts": [spec.moe.experts],
        }
        return _finish(source, dtype, files_to_write(tensors, _TAG, qkv, args, state))
    files: list[OutputFile] = []
    for number, table in enumerate(pipeline_tables(spec, parallel.tp, qkv), 1):
        for rank in range(parallel.tp):
            held = {row.name: tensors.tensor(row, rank) for row in table}
            path = f"{_TAG}/layer_{number:02d}-model_{rank:02d}-model_states.pt"
            files.append(torch_file(path, Ordered(held)))
    for mp in range(parallel.tp * parallel.pp):
        state = {
            "module": None,
            **_engine_state(parallel.tp, parallel.pp),
            **_MEGATRON_STATE,
            "args": Namespace(args),
        }
        files.append(torch_file(f"{_TAG}/mp_rank_{mp:02d}_model_states.pt", state))
    return _finish(source, dtype, files)
