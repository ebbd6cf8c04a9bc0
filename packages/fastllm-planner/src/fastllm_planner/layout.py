"""How a job is laid out over devices, and the rules real engines impose on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fastllm_planner.arch import ArchSpec
from fastllm_planner.backends import Backend
from fastllm_planner.hardware import Cluster

Recompute = Literal["none", "selective", "full"]
Offload = Literal["none", "optimizer", "optimizer+params"]
Dtype = Literal["bf16", "fp16", "fp32", "fp8"]


@dataclass(frozen=True)
class Layout:
    """One way to run a job. Batches in sequences, ``seq_len`` in tokens.

    ``ep`` divides ``dp*cp``: expert parallelism re-uses data-parallel ranks. ``shard_group``: ranks
    over which ZeRO shards (hybrid sharding); 0 means all of ``dp*cp``.
    ``recompute_share``: share of the layers that ``recompute`` covers ("every other layer": 0.5).
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    cp: int = 1
    ep: int = 1
    zero_stage: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    seq_len: int = 2048
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    offload: Offload = "none"
    dtype: Dtype = "bf16"
    flash: bool = True
    shard_group: int = 0
    recompute_share: float = 1.0

    @cached_property
    def world_size(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches that each model replica runs per step (at least one)."""
        return max(1, self.global_batch // (self.dp * self.micro_batch))

    @cached_property
    def shard_size(self) -> int:
        """Ranks over which ZeRO shards the states of one model-parallel rank."""
        return self.shard_group or self.dp * self.cp


def check_layout(
    spec: ArchSpec,
    layout: Layout,
    cluster: Cluster,
    backend: Backend,
    *,
    tp_across_nodes: bool = False,
) -> list[str]:
    """Why the layout cannot run, one sentence each; empty if it can (memory is not checked)."""
    return [
        *_device_reasons(layout, cluster, tp_across_nodes),
        *_tensor_reasons(spec, layout),
        *_pipeline_reasons(spec, layout, backend),
        *_batch_reasons(layout),
        *_state_reasons(layout, backend),
    ]


def _device_reasons(layout: Layout, cluster: Cluster, tp_across_nodes: bool) -> list[str]:
    reasons: list[str] = []
    if layout.world_size != cluster.n_gpus:
        reasons.append(
            f"dp={layout.dp} x tp={layout.tp} x pp={layout.pp} x cp={layout.cp} is "
            f"{layout.world_size} devices, the cluster has {cluster.n_gpus}"
        )
    if layout.tp > cluster.fabric_size and not tp_across_nodes:
        reasons.append(
            f"tp={layout.tp} leaves the node of {cluster.fabric_size} devices: its all-reduces "
            "would run over the network"
        )
    if not cluster.gpu.supports(layout.dtype):
        reasons.append(f"{cluster.gpu.name} has no {layout.dtype} units")
    return reasons


def _tensor_reasons(spec: ArchSpec, layout: Layout) -> list[str]:
    reasons: list[str] = []
    tp = layout.tp
    if spec.heads % tp:
        reasons.append(f"tp={tp} does not divide {spec.heads} attention heads")
    if spec.kv_heads % tp and tp % spec.kv_heads:
        reasons.append(f"tp={tp} neither divides nor is a multiple of {spec.kv_heads} KV heads")
    if (spec.moe is None or spec.moe.first_dense_layers) and spec.ffn_hidden % tp:
        reasons.append(f"tp={tp} does not divide the MLP width {spec.ffn_hidden}")
    if spec.moe is not None and spec.moe.ffn_hidden % tp:
        reasons.append(f"tp={tp} does not divide the experts' width {spec.moe.ffn_hidden}")
    if layout.sequence_parallel and layout.seq_len % (tp * layout.cp):
        reasons.append(
            f"sequence parallelism cannot split {layout.seq_len} tokens over "
            f"tp={tp} x cp={layout.cp}"
        )
    if layout.sequence_parallel and tp == 1:
        reasons.append("sequence parallelism needs tp > 1")
    if layout.cp > 1 and layout.seq_len % (2 * layout.cp):
        reasons.append(f"cp={layout.cp} needs a sequence length that 2*cp divides")
    reasons += _expert_reasons(spec, layout)
    return reasons


def _expert_reasons(spec: ArchSpec, layout: Layout) -> list[str]:
    if layout.ep == 1:
        return []
    if spec.moe is None:
        return [f"ep={layout.ep} needs a mixture of experts, the model is dense"]
    reasons: list[str] = []
    if spec.moe.experts % layout.ep:
        reasons.append(f"ep={layout.ep} does not divide {spec.moe.experts} experts")
    if (layout.dp * layout.cp) % layout.ep:
        reasons.append(f"ep={layout.ep} does not divide dp x cp = {layout.dp * layout.cp}")
    return reasons


def pipeline_slots(spec: ArchSpec, backend: Backend, pp: int) -> int:
    """What has to divide by ``pp`` times the virtual stages: the layers, or with the two ends."""
    if spec.layers % pp and backend.ends_as_layers and (spec.layers + 2) % pp == 0:
        return spec.layers + 2
    return spec.layers


def _pipeline_reasons(spec: ArchSpec, layout: Layout, backend: Backend) -> list[str]:
    reasons: list[str] = []
    pp, v = layout.pp, layout.virtual_stages
    if pp > spec.layers:
        reasons.append(f"pp={pp} leaves stages without layers: the model has {spec.layers}")
    elif v > 1 and pipeline_slots(spec, backend, pp) % (pp * v):
        reasons.append(f"{spec.layers} layers do not split into pp={pp} x {v} virtual stages")
    if v > 1 and pp == 1:
        reasons.append("virtual stages need pp > 1")
    if v > 1 and layout.micro_batches % pp:
        reasons.append(
            f"interleaving needs micro-batches ({layout.micro_batches}) to be a multiple of pp={pp}"
        )
    return reasons


def _batch_reasons(layout: Layout) -> list[str]:
    per_round = layout.dp * layout.micro_batch
    if layout.global_batch % per_round:
        return [
            f"global batch {layout.global_batch} is not a multiple of dp x micro-batch = "
            f"{per_round}"
        ]
    return []


def _state_reasons(layout: Layout, backend: Backend) -> list[str]:
    reasons: list[str] = []
    if layout.zero_stage >= 2 and layout.pp > 1 and not backend.zero23_with_pipeline:
        reasons.append(
            f"ZeRO-{layout.zero_stage} does not work with pipeline parallelism in {backend.name}: "
            "gradients would be reduced once per micro-batch"
        )
    if layout.zero_stage > backend.max_zero_stage:
        reasons.append(f"{backend.name} has no ZeRO-{layout.zero_stage}")
    if layout.virtual_stages > 1 and not backend.interleaving:
        reasons.append(f"{backend.name} has no interleaved pipeline schedule")
    if layout.offload != "none" and not backend.offload:
        reasons.append(f"{backend.name} cannot offload to the host")
    if layout.offload == "optimizer" and layout.zero_stage < 1:
        reasons.append("optimizer offload needs ZeRO-1 or higher")
    if layout.offload == "optimizer+params" and layout.zero_stage < 3:
        reasons.append("parameter offload needs ZeRO-3")
    if layout.offload != "none" and layout.pp > 1:
        reasons.append("offload with pipeline parallelism is not supported by DeepSpeed's engine")
    if layout.cp > 1 and not backend.context_parallel:
        reasons.append(f"{backend.name} has no context parallelism")
    if layout.tp > 1 and not backend.tensor_parallel:
        reasons.append(f"{backend.name} has no tensor parallelism")
    if layout.pp > 1 and not backend.pipeline_parallel:
        reasons.append(f"{backend.name} has no pipeline parallelism")
    return reasons
