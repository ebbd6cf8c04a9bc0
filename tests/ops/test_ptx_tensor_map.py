"""Tensor maps that a kernel modifies, in the PTX emulator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .sm90_kernels import WAIT, filled, kinds, run


@pytest.fixture
def ptx(emulated_ptx: Any) -> Iterator[Any]:
    emulated_ptx.core.set_options(capability=90)
    yield emulated_ptx
    emulated_ptx.core.clear_reports()


# Warp 0 changes a map of which it has a copy in shared memory: the tensor's address, rows and
# stride. It publishes the map behind the 128 words of the result; warp 1 loads by it.
MAP = f"""
.shared .align 128 .b8 map[128];
.reg .b64 %source, %published;
mov.u32 %r10, map; shl.b32 %r11, %r1, 2; add.s32 %r12, %r10, %r11;
add.s64 %published, %rd1, 512; add.s64 %rd10, %rd2, 512;
setp.ge.u32 %p2, %r1, 32;
@%p2 bra $joined;
add.s64 %source, %rd2, %rd3; ld.global.u32 %r13, [%source+1024]; st.shared.u32 [%r12], %r13;
bar.warp.sync -1;
@!%p1 bra $changed;
mbarrier.init.shared::cta.b64 [%r3], 1;
fence.mbarrier_init.release.cluster;
CHANGE
$changed:
CONVERGE
PUBLISH
$joined:
SYNC
ACQUIRE
setp.ne.u32 %p3, %r1, 32;
@%p3 bra $issued;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2],
 [%published, {{0, 0}}], [%r3];
$issued:
{WAIT.format(at=0, parity=0)}
@%p2 bra $end;
shl.b32 %r14, %r1, 4; add.s32 %r15, %r2, %r14;
ld.shared.v4.f32 {{%f1, %f2, %f3, %f4}}, [%r15];
mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd1, %rd5;
st.global.v4.f32 [%rd6], {{%f1, %f2, %f3, %f4}};
$end:
"""
REPLACE = "tensormap.replace.tile"
MAP_PARTS = {
    "CHANGE": f"{REPLACE}.global_address.shared::cta.b1024.b64 [%r10], %rd10;"
    f"{REPLACE}.global_dim.shared::cta.b1024.b32 [%r10], 1, 6;"
    f"{REPLACE}.global_stride.shared::cta.b1024.b64 [%r10], 0, 32;",
    "CONVERGE": "bar.warp.sync -1;",
    "PUBLISH": "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync"
    ".aligned [%published], [%r10], 128;",
    "SYNC": "bar.sync 0;",
    "ACQUIRE": "fence.proxy.tensormap::generic.acquire.gpu [%published], 128;",
}


def run_map(
    ptx: Any, data: torch.Tensor, changes: dict[str, str], body: str = MAP, threads: int = 64
) -> torch.Tensor:
    """``data``: 256 words, of which the map that is changed has 8 rows of 16."""
    first = ptx.put(data)
    words = torch.frombuffer(
        bytearray(ptx.core.tensor_map(first.pointer(), [16, 8], [64], [16, 8])), dtype=torch.float32
    )
    body = filled(body, MAP_PARTS, **changes)
    return run(ptx, body, threads, torch.cat([data, words]), 160)[:128]


def test_tensor_map_changed_by_a_kernel(ptx: Any) -> None:
    data = torch.randn(256)
    got = run_map(ptx, data, {})
    assert kinds(ptx) == set()
    rows = [data[128 + 8 * row :][:16] for row in range(6)]
    assert torch.equal(got.view(8, 16), torch.stack([*rows, torch.zeros(16), torch.zeros(16)]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ACQUIRE": ""}, {"proxy-fence"}),
        # Before the barrier, so that nothing orders it after the change.
        ({"SYNC": MAP_PARTS["ACQUIRE"] + "bar.sync 0;", "ACQUIRE": ""}, {"proxy-fence"}),
        ({"SYNC": ""}, {"proxy-fence"}),
        ({"CONVERGE": ""}, {"race-shared"}),
        ({"PUBLISH": "ld.shared.u32 %r13, [%r12]; add.s64 %rd7, %published, %rd3;"
          "st.global.u32 [%rd7], %r13;"}, {"tensor-map"}),
        ({"PUBLISH": MAP_PARTS["PUBLISH"] + "st.global.u32 [%published], %r13;"}, {"tensor-map"}),
        ({"PUBLISH": ""}, {"bulk-copy"}),
        ({"CHANGE": MAP_PARTS["CHANGE"].replace(", 32;", ", 24;")}, {"tensor-map"}),
        ({"CHANGE": MAP_PARTS["CHANGE"].replace("1, 6;", "1, 0;")}, {"tensor-map"}),
        ({"CHANGE": MAP_PARTS["CHANGE"].replace("%rd10", "0x1008")}, {"tensor-map"}),
        ({"CHANGE": MAP_PARTS["CHANGE"].replace("[%r10]", "[%r2]")}, {"uninit-shared"}),
        # Past the end of the data.
        ({"CHANGE": MAP_PARTS["CHANGE"].replace("1, 6;", "1, 8;").replace(", 32;", ", 256;")},
         {"out-of-bounds"}),
    ],
)  # fmt: skip
def test_tensor_map_changed_without(ptx: Any, changes: dict[str, str], expected: set[str]) -> None:
    run_map(ptx, torch.randn(256), changes)
    found = kinds(ptx)
    assert found & expected, f"reported {found}"


# A warp stores by a map in global memory, which it then publishes again.
STORE_BY_MAP = """
.shared .align 128 .b8 map[128];
.reg .b64 %source, %published;
mov.u32 %r10, map; shl.b32 %r11, %r1, 2; add.s32 %r12, %r10, %r11;
add.s64 %published, %rd1, 512;
add.s64 %source, %rd2, %rd3; ld.global.u32 %r13, [%source+1024]; st.shared.u32 [%r12], %r13;
cvt.rn.f32.u32 %f1, %r1; shl.b32 %r14, %r1, 4; add.s32 %r15, %r2, %r14;
st.shared.v4.f32 [%r15], {%f1, %f1, %f1, %f1};
fence.proxy.async.shared::cta;
bar.warp.sync -1;
@!%p1 bra $changed;
tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r10], %rd1;
$changed:
bar.warp.sync -1;
PUBLISH
ACQUIRE
@!%p1 bra $stored;
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%published, {0, 0}], [%r2];
cp.async.bulk.commit_group;
WAIT
$stored:
bar.warp.sync -1;
PUBLISH
@%p1 cp.async.bulk.wait_group 0;
"""


@pytest.mark.parametrize("wait", ["", "cp.async.bulk.wait_group.read 0;"])
def test_tensor_map_published_under_a_store(ptx: Any, wait: str) -> None:
    out = run_map(ptx, torch.zeros(256), {"WAIT": wait}, STORE_BY_MAP, 32)
    assert kinds(ptx) == (set() if wait else {"race-global"})
    assert torch.equal(out, torch.arange(128) // 4)
