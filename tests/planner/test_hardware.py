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


@pytest.mark.parametrize(
    ("spelling", "name", "gib"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-80G", 79.2),
        ("NVIDIA A100-SXM4-40GB", "A100-40G", 39.4),
        ("A100SXM4-40GB", "A100-40G", 39.4),
        ("a100 40gb", "A100-40G", 39.4),
        ("A100-40GB-PCIe", "A100-PCIe-40G", 39.4),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80G", 79.2),
        ("A100-64G", "A100-80G", 63.36),
        ("A100", "A100-80G", 79.2),
        ("Tesla V100-SXM2-16GB", "V100-16G", 15.8),
        ("V100-16GB", "V100-16G", 15.8),
        ("V100", "V100-32G", 31.7),
        ("H100 SXM", "H100-SXM", 79.1),
        ("H100-SXM5-80GB", "H100-SXM", 79.1),
        ("NVIDIA H100 80GB HBM3", "H100-SXM", 79.1),
        ("NVIDIA H100 PCIe", "H100-PCIe", 79.1),
        ("NVIDIA H100 NVL", "H100-NVL", 93.1),
        ("H100-96GB", "H100-96G", 94.9),
        ("H100-96G-HBM2e-500W", "H100-96G", 94.9),
        ("NVIDIA H200", "H200-SXM", 139.8),
        ("H20-96GB", "H20", 95.0),
        ("NVIDIA B200", "B200-SXM", 178.4),
        ("B200-192GB", "B200-SXM", 178.4),
        ("DGX GB200 NVL72", "GB200", 184.0),
        ("NVIDIA GH200 480GB", "GH200", 94.5),
        ("RTX 4090", "RTX-4090", 23.6),
        ("NVIDIA GeForce RTX 4090", "RTX-4090", 23.6),
        ("rtx4090", "RTX-4090", 23.6),
        ("RTX PRO 6000 Blackwell", "RTX-PRO-6000", 95.0),
        ("AMD Instinct MI300X OAM", "MI300X", 191.0),
        ("MI250X-GCD", "MI250X", 64.0),
    ],
)
def test_boards_are_known_by_every_usual_spelling(spelling: str, name: str, gib: float) -> None:
    device = gpu(spelling)
    assert device.name == name
    assert device.memory_bytes / GIB == pytest.approx(gib)


@pytest.mark.parametrize(
    "name", ["A100-8OG", "H100-fast", "L40S-SXM", "TPUv4", "A10", "H1000", "H100-8G", ""]
)
def test_what_is_not_known_is_refused_not_guessed(name: str) -> None:
    with pytest.raises(UserError, match="unknown GPU"):
        gpu(name)


def test_names_in_tables_may_say_more_than_is_known() -> None:
    assert gpu("A100-80G-SXM (Selene)", lenient=True).name == "A100-80G"
    with pytest.raises(UserError):
        gpu("TPUv4", lenient=True)


def test_a_ceiling_says_whose_it_is() -> None:
    assert gpu("H100").matmul_source == "measured"
    assert gpu("H800").matmul_source == "as measured on H100-SXM"
    assert "scaled" in gpu("V100").matmul_source
    assert "share of the peak" in gpu("H100-PCIe").matmul_source
    assert "share of the peak" in gpu("RTX-PRO-6000").matmul_source


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
    assert "not measured" in machine.matmul_source
    half = Cluster(machine, 2).device
    assert half.memory_bytes == machine.memory_bytes // 2
    assert half.matmul("fp32") == pytest.approx(machine.matmul("fp32") / 2)
    assert Cluster(gpu("H100"), 2).device is gpu("H100")


def test_a_rack_scale_fabric_is_wider_than_its_nodes() -> None:
    rack = Cluster(gpu("GB200"), 144, 4)
    assert rack.fabric_size == 72
    assert group(rack, 8, 1).nodes == 1
    assert group(Cluster(gpu("H100"), 144, 4), 8, 1).nodes == 2
