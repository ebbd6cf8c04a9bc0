"""The tables: complete, consistent, found by their usual names; clusters and the CPU."""

import pytest

from fastllm_planner.communication import group
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import (
    GIB,
    Cluster,
    attention_rate,
    cpu_device,
    gpu,
    gpu_names,
)

NAMED = (
    "V100-16G", "V100-32G", "A100-40G", "A100-80G", "A100-PCIe-80G", "A800", "H100", "H100-PCIe",
    "H100-NVL", "H800", "H20", "H200", "B200", "B300", "GB200", "L40S", "RTX-4090", "RTX-5090",
    "MI300X", "cpu",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_every_promised_device_is_there_and_plausible(name: str) -> None:
    device = gpu(name)
    half = "bf16" if device.supports("bf16") else "fp16"
    assert 0 < device.matmul(half) <= device.peak(half)
    assert device.memory_bytes > 4 * GIB
    assert device.peer_bandwidth <= device.intra_node_bandwidth
    assert 0.5 < device.sustained <= 1.0
    assert device.source
    assert attention_rate(device, "fa3").bwd <= attention_rate(device, "fa3").fwd


def test_names_of_the_published_table_resolve() -> None:
    for alias in ("A100-80G-SXM", "H100-80G-SXM", "B200-180G-SXM", "V100-32G-SXM2", "RTX-4090-24G"):
        assert gpu(alias).name in gpu_names()


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        gpu("A100-8OG")
    assert "A100-80G" in caught.value.hint


def test_a_dtype_the_board_lacks_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="no bf16"):
        gpu("V100").peak("bf16")


def test_older_attention_kernels_are_slower_and_newer_ones_fall_back() -> None:
    hopper, ampere = gpu("H100"), gpu("A100")
    assert attention_rate(hopper, "fa1").fwd < attention_rate(hopper, "fa2").fwd
    assert attention_rate(hopper, "fa2").fwd < attention_rate(hopper, "fa3").fwd
    assert attention_rate(ampere, "fa3") == attention_rate(ampere, "fa2")


def test_cluster_counts_nodes_and_takes_a_given_network() -> None:
    assert Cluster(gpu("H100"), 20).nodes == 3
    assert Cluster(gpu("H100"), 8).network_bandwidth == 50e9
    assert Cluster(gpu("H100"), 8, 8, 12.5e9).network_bandwidth == 12.5e9
    with pytest.raises(UserError):
        Cluster(gpu("H100"), 0)


def test_ranks_on_a_cpu_share_it() -> None:
    machine = cpu_device()
    assert "prior" in machine.name
    assert not machine.matmul_measured
    half = Cluster(machine, 2).device
    assert half.memory_bytes == machine.memory_bytes // 2
    assert half.matmul("fp32") == pytest.approx(machine.matmul("fp32") / 2)
    assert Cluster(gpu("H100"), 2).device is gpu("H100")


def test_a_rack_scale_fabric_is_wider_than_its_nodes() -> None:
    rack = Cluster(gpu("GB200"), 144, 4)
    assert rack.fabric_size == 72
    assert group(rack, 8, 1).nodes == 1
    assert group(Cluster(gpu("H100"), 144, 4), 8, 1).nodes == 2
