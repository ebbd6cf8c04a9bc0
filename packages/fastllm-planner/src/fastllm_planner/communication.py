"""Time of collectives: ring and hierarchical volumes, bandwidth by message size, latency.

All volumes are bytes of the *full* tensor; times are seconds on the critical rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastllm_planner.hardware import Cluster

# Seconds per ring step: NVLink ~3 us, EFA/IB ~10-30 us (dlcalc hardware.py; SimuMax fits 3-15 us).
INTRA_LATENCY = 4e-6
INTER_LATENCY = 12e-6
# Share of the nominal link that a large message reaches: 8x H200 396-482 of 450 GB/s, 8x B200
# 735-846 of 900, EFA 74 % per NIC (stas00/ml-engineering network README).
INTRA_EFFICIENCY = 0.82
INTER_EFFICIENCY = 0.74
# Bytes at which half of that is reached (8x B200 all-reduce: 255 of 846 GB/s at 16 MiB, 401 at 64).
INTRA_HALF_BYTES = 4e6
INTER_HALF_BYTES = 16e6


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
    device = cluster.gpu
    per_node = max(1, min(size, cluster.gpus_per_node // stride))
    intra = device.intra_node_bandwidth
    if device.peer_bandwidth < intra:
        intra = min(intra, device.peer_bandwidth * max(1, per_node - 1))
    return Group(size, per_node, intra, cluster.network_bandwidth)


def _ramp(size_bytes: float, half: float) -> float:
    return size_bytes / (size_bytes + half)


def gather_seconds(g: Group, size_bytes: float) -> float:
    """All-gather (or reduce-scatter, the same volume) of a tensor of ``size_bytes`` in total."""
    if g.size <= 1 or size_bytes <= 0:
        return 0.0
    seconds = 0.0
    if g.per_node > 1:
        share = (g.per_node - 1) / g.per_node
        rate = g.intra * INTRA_EFFICIENCY * _ramp(size_bytes, INTRA_HALF_BYTES)
        seconds = size_bytes * share / rate + INTRA_LATENCY * (g.per_node - 1)
    if g.nodes > 1:
        # A node receives (k-1)/k of the tensor once, through the NICs of all its ranks.
        share = (g.nodes - 1) / g.nodes / g.per_node
        rate = g.inter * INTER_EFFICIENCY * _ramp(size_bytes, INTER_HALF_BYTES)
        across = size_bytes * share / rate + INTER_LATENCY * _steps(g.nodes)
        seconds = max(seconds, across)
    return seconds


def _steps(nodes: int) -> int:
    """Latency steps of a tree or ring, whichever NCCL would take (it switches to trees)."""
    return min(nodes - 1, 2 * max(1, (nodes - 1).bit_length()))


def all_reduce_seconds(g: Group, size_bytes: float) -> float:
    """Reduce-scatter then all-gather."""
    return 2.0 * gather_seconds(g, size_bytes)


def all_to_all_seconds(g: Group, bytes_per_rank: float) -> float:
    """Every rank sends ``bytes_per_rank`` in total, spread evenly over the group."""
    if g.size <= 1 or bytes_per_rank <= 0:
        return 0.0
    outside = (g.size - g.per_node) / g.size
    inside = (g.per_node - 1) / g.size
    rate_in = g.intra * INTRA_EFFICIENCY * _ramp(bytes_per_rank, INTRA_HALF_BYTES)
    rate_out = g.inter * INTER_EFFICIENCY * _ramp(bytes_per_rank, INTER_HALF_BYTES)
    latency = INTRA_LATENCY if g.nodes == 1 else INTER_LATENCY
    return max(bytes_per_rank * inside / rate_in, bytes_per_rank * outside / rate_out) + latency


def send_seconds(cluster: Cluster, size_bytes: float, *, same_node: bool) -> float:
    """Point to point. The bandwidth ramp of a lone pair is that of a collective."""
    if same_node:
        rate = cluster.gpu.peer_bandwidth * INTRA_EFFICIENCY
        return size_bytes / (rate * _ramp(size_bytes, INTRA_HALF_BYTES)) + INTRA_LATENCY
    rate = cluster.network_bandwidth * INTER_EFFICIENCY
    return size_bytes / (rate * _ramp(size_bytes, INTER_HALF_BYTES / 8)) + INTER_LATENCY
