"""What offloading keeps in a node's memory and on its drives, and what moving it costs.

Host bytes are DeepSpeed's own estimators (``stage_1_and_2.py``, ``stage3.py``), with each rank's
share of a tensor-parallel model. Where a node's memory cannot hold them and it has drives, the
states go there (ZeRO-Infinity, Rajbhandari et al. arXiv:2104.07857) and memory keeps the pinned
buffers.
"""

from __future__ import annotations

from fastllm_planner.arch import ArchSpec
from fastllm_planner.hardware import GIB, Cluster
from fastllm_planner.layout import Layout
from fastllm_planner.model_sums import model_sums

BUFFER_FACTOR = 1.5
# Pinned swap buffers per rank: DeepSpeed's defaults, 4 + 5 buffers of 1e8 fp32 elements.
SWAP_BUFFER_BYTES = 9 * 1e8 * 4.0
# Host Adam streams gradient, master and moments through DRAM; bandwidths per node are priors.
HOST_ADAM_BYTES = 28.0
HOST_MEMORY_BANDWIDTH = 150e9
NVME_BANDWIDTH = 6e9


def host_and_nvme_bytes(spec: ArchSpec, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Bytes per node in memory and on drives."""
    if layout.offload == "none":
        return 0.0, 0.0
    host = _host_bytes(spec, layout, cluster)
    memory = cluster.host_memory_bytes
    if memory is None or host <= memory or not cluster.nvme_bytes:
        return host, 0.0
    per_node, nodes = _ranks(layout, cluster)
    moved = 16.0 if layout.offload == "optimizer+params" else 14.0
    return per_node * SWAP_BUFFER_BYTES + GIB, moved * model_sums(spec).total / nodes


def _ranks(layout: Layout, cluster: Cluster) -> tuple[int, int]:
    """Ranks per node, and nodes in use."""
    per_node = min(cluster.gpus_per_node, layout.world_size)
    return per_node, -(-layout.world_size // cluster.gpus_per_node)


def _host_bytes(spec: ArchSpec, layout: Layout, cluster: Cluster) -> float:
    params = float(model_sums(spec).total)
    per_node, nodes = _ranks(layout, cluster)
    if layout.zero_stage < 3:
        # while loading, every rank holds its fp32 part of the model; then 16 bytes are shared
        loading = 4.0 * per_node / layout.tp
        return params * max(loading, 16.0 / nodes) * BUFFER_FACTOR
    bytes_per_param = 18.0 if layout.offload == "optimizer+params" else 16.0
    return bytes_per_param * params / nodes * BUFFER_FACTOR


def offload_seconds(spec: ArchSpec, layout: Layout, cluster: Cluster) -> float:
    """Seconds per step of the host's update, the transfers and the drives."""
    sums = model_sums(spec)
    shard = layout.shard_size if layout.zero_stage >= 1 else 1
    owned = sums.total / layout.tp / layout.pp / shard
    per_node, nodes = _ranks(layout, cluster)
    moved = 4.0 * owned  # bf16 gradients out, bf16 weights back
    if layout.offload == "optimizer+params":
        # weights come in for the forward and the backward pass of every micro-batch
        moved += 4.0 * owned * layout.micro_batches
    seconds = HOST_ADAM_BYTES * owned * per_node / HOST_MEMORY_BANDWIDTH
    seconds += moved / cluster.device.host_bandwidth
    if host_and_nvme_bytes(spec, layout, cluster)[1]:
        # master and moments are read and written once, weights read for every pass
        through = 24.0 * sums.total / nodes
        if layout.offload == "optimizer+params":
            through += 4.0 * sums.total / nodes * layout.micro_batches
        seconds += through / NVME_BANDWIDTH
    return seconds
