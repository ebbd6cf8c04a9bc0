"""Time of collectives: ring and hierarchical volumes, bandwidth by message size, latency.

All volumes are bytes of the *full* tensor; times are seconds on the critical rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastllm_planner.hardware import Cluster

# A collective costs a fixed time plus its bytes at a rate. From the all-reduce tables of
# stas00/ml-engineering's network README: 8x B200 (900 GB/s) 51 us at 1 MiB, 115 at 16, 293 at
# 64 MiB, 727 at 256 MiB is about 80 us + bytes at 0.82 of the link; half of that per direction.
# 4 nodes x 8 B200 over EFA: 383 us at 1 MiB, 515 at 16 MiB, 2.3 ms at 256, then 0.74 per NIC.
INTRA_CALL = 40e-6
INTER_CALL = 60e-6
INTER_STEP = 20e-6  # per further node: NCCL gathers and scatters run over rings
INTRA_EFFICIENCY = 0.82
INTER_EFFICIENCY = 0.74
SEND_CALL = 15e-6


@dataclass(frozen=True)
class Group:
    """``size`` ranks that talk, ``per_node`` in each node. Bandwidths in bytes/s per rank."""

    size: int
    per_node: int
    intra: float
    inter: float

    @property
    def nodes(self) -> int:
        return -(-self.size // self.per_node)


def group(cluster: Cluster, size: int, stride: int) -> Group:
    """``size`` ranks that are ``stride`` apart in rank order (ranks fill nodes in order)."""
    device = cluster.device
    per_node = max(1, min(size, cluster.fabric_size // stride))
    intra = device.intra_node_bandwidth
    if device.peer_bandwidth < intra:
        intra = min(intra, device.peer_bandwidth * max(1, per_node - 1))
    return Group(size, per_node, intra, cluster.network_bandwidth)


def gather_seconds(g: Group, size_bytes: float) -> float:
    """All-gather (or reduce-scatter, the same volume) of a tensor of ``size_bytes`` in total."""
    if g.size <= 1 or size_bytes <= 0:
        return 0.0
    seconds = 0.0
    if g.per_node > 1:
        share = (g.per_node - 1) / g.per_node
        seconds = size_bytes * share / (g.intra * INTRA_EFFICIENCY) + INTRA_CALL
    if g.nodes > 1:
        # A node receives (k-1)/k of the tensor once, through the NICs of all its ranks.
        share = (g.nodes - 1) / g.nodes / g.per_node
        across = size_bytes * share / (g.inter * INTER_EFFICIENCY)
        seconds = max(seconds, across + INTER_CALL + INTER_STEP * (g.nodes - 1))
    return seconds


def all_reduce_seconds(g: Group, size_bytes: float) -> float:
    """Reduce-scatter then all-gather."""
    return 2.0 * gather_seconds(g, size_bytes)


def all_to_all_seconds(g: Group, bytes_per_rank: float) -> float:
    """Every rank sends ``bytes_per_rank`` in total, spread evenly over the group."""
    if g.size <= 1 or bytes_per_rank <= 0:
        return 0.0
    outside = (g.size - g.per_node) / g.size
    inside = (g.per_node - 1) / g.size
    within = bytes_per_rank * inside / (g.intra * INTRA_EFFICIENCY)
    across = bytes_per_rank * outside / (g.inter * INTER_EFFICIENCY)
    return max(within, across) + (INTRA_CALL if g.nodes == 1 else INTER_CALL)


def send_seconds(cluster: Cluster, size_bytes: float, *, same_node: bool) -> float:
    """Point to point."""
    if same_node:
        rate = cluster.device.peer_bandwidth * INTRA_EFFICIENCY
    else:
        rate = cluster.network_bandwidth * INTER_EFFICIENCY
    return size_bytes / rate + SEND_CALL
