"""Synchronisation of sm_90a in the PTX emulator: mbarriers, bulk copies, TMA, wgmma.

Each kernel is correct as it stands; each of its bugs takes something away, and must be reported.
"""

from __future__ import annotations

import re
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


# One thread copies 512 bytes in bulk; all wait for it, read it, and hand the tile back; then it is
# written again.
COPY = f"""
@!%p1 bra $ready;
mbarrier.init.shared::cta.b64 [%r3], 1;
mbarrier.init.shared::cta.b64 [%r3+8], 128;
INITFENCE
$ready:
SYNC
@!%p1 bra $issued;
EXPECT
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2], 512, [%r3];
$issued:
FULL
ld.shared.f32 %f1, [%r5];
RELEASE
@!%p1 bra $second;
EMPTY
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd2+512], 512, [%r3];
$second:
{WAIT.format(at=0, parity=1)}
ld.shared.f32 %f2, [%r5];
add.f32 %f1, %f1, %f2;
st.global.f32 [%rd4], %f1;
"""
COPY_PARTS = {
    "INITFENCE": "fence.mbarrier_init.release.cluster;",
    "SYNC": "bar.sync 0;",
    "EXPECT": "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;",
    "FULL": WAIT.format(at=0, parity=0),
    "RELEASE": "mbarrier.arrive.shared::cta.b64 _, [%r3+8];",
    "EMPTY": WAIT.format(at=8, parity=0),
}


def test_bulk_copy(ptx: Any) -> None:
    data = torch.randn(256)
    for schedule in (0, 1, 5):
        ptx.core.set_options(capability=90, schedule=schedule)
        got = run(ptx, filled(COPY, COPY_PARTS), 128, data, 128)
        assert kinds(ptx) == set()
        assert torch.equal(got, data[:128] + data[128:])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"FULL": ""}, {"async-copy", "race-shared"}),
        # All read at once what only the first thread has waited for.
        ({"FULL": f"@!%p1 bra $first; {COPY_PARTS['FULL']} $first:"}, {"race-shared"}),
        ({"EMPTY": ""}, {"race-shared"}),
        ({"RELEASE": ""}, {"deadlock"}),
        ({"EXPECT": ""}, {"deadlock"}),
        ({"EXPECT": COPY_PARTS["EXPECT"].replace("512", "1024")}, {"deadlock"}),
        ({"EXPECT": COPY_PARTS["EXPECT"].replace("512", "256")}, {"deadlock", "async-copy"}),
        ({"SYNC": ""}, {"race-shared", "mbarrier"}),
        ({"INITFENCE": ""}, {"proxy-fence"}),
        # Two phases pass instead of one, and the parity is what it was.
        ({"RELEASE": COPY_PARTS["RELEASE"] * 2}, {"deadlock"}),
        ({"RELEASE": COPY_PARTS["RELEASE"].replace("%r3+8", "%r2+1024")}, {"mbarrier"}),
    ],
)
def test_bulk_copy_without(ptx: Any, changes: dict[str, str], expected: set[str]) -> None:
    for schedule in (0, 1):
        ptx.core.set_options(capability=90, schedule=schedule)
        run(ptx, filled(COPY, COPY_PARTS, **changes), 128, torch.randn(256), 128)
        found = kinds(ptx)
        assert found & expected, f"reported {found}"


def test_wait_that_returns_at_once(ptx: Any) -> None:
    once = "mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r3], 0;"
    ptx.core.set_options(capability=90, schedule=1)
    run(ptx, filled(COPY, COPY_PARTS, FULL=once), 128, torch.randn(256), 128)
    assert kinds(ptx) & {"async-copy", "race-shared"}
    # With a time to wait it is taken to succeed where it can.
    run(ptx, filled(COPY, COPY_PARTS, FULL=once.replace(" 0;", " 0, 1000;")), 128,
        torch.randn(256), 128)  # fmt: skip
    assert kinds(ptx) == set()


# Two phases of one mbarrier. Warp 1 waits for each, and tells warp 0 before the second may end.
# Warp 2 holds warp 0 up, which orders neither after warp 1.
PHASES = f"""
@!%p1 bra $ready;
mbarrier.init.shared::cta.b64 [%r3], 1;
mbarrier.init.shared::cta.b64 [%r3+8], 32;
$ready:
bar.sync 0;
shr.u32 %r6, %r1, 5;
setp.ne.u32 %p2, %r6, 1;
@%p2 bra $others;
{WAIT.format(at=0, parity=0)}
mbarrier.arrive.shared::cta.b64 _, [%r3+8];
{WAIT.format(at=0, parity=1)}
bra $end;
$others:
@!%p1 bra $held;
mbarrier.arrive.shared::cta.b64 _, [%r3];
$held:
bar.sync 1, 64;
bar.sync 2, 64;
@!%p1 bra $end;
TOLD
mbarrier.arrive.shared::cta.b64 _, [%r3];
$end:
"""


def test_phase_that_overtakes_a_wait(ptx: Any) -> None:
    told = WAIT.format(at=8, parity=0)
    for schedule in (0, 1, 5):
        ptx.core.set_options(capability=90, schedule=schedule)
        run(ptx, PHASES.replace("TOLD", told), 96, torch.zeros(4), 4)
        assert kinds(ptx) == set()
    ptx.core.set_options(capability=90, schedule=0)  # in which the wait happens to come in time
    run(ptx, PHASES.replace("TOLD", ""), 96, torch.zeros(4), 4)
    assert kinds(ptx) == {"mbarrier"}


# Every thread writes its word, one thread stores the tile in bulk; the tile is then written again.
STORE = """
cvt.rn.f32.u32 %f1, %r1;
st.shared.f32 [%r5], %f1;
FENCE
SYNC
@!%p1 bra $stored;
cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 512;
COMMIT
WAIT
$stored:
AGAIN
st.shared.f32 [%r5], %f1;
"""
STORE_PARTS = {
    "FENCE": "fence.proxy.async.shared::cta;",
    "SYNC": "bar.sync 0;",
    "COMMIT": "cp.async.bulk.commit_group;",
    "WAIT": "cp.async.bulk.wait_group.read 0;",
    "AGAIN": "bar.sync 0;",
}


def test_bulk_store(ptx: Any) -> None:
    got = run(ptx, filled(STORE, STORE_PARTS), 128, torch.zeros(4), 128)
    assert kinds(ptx) == set()
    assert got.tolist() == list(range(128))
    # The fence may also stand behind the barrier, in the thread that stores.
    late = filled(STORE, STORE_PARTS, FENCE="", SYNC="bar.sync 0; fence.proxy.async.shared::cta;")
    run(ptx, late, 128, torch.zeros(4), 128)
    assert kinds(ptx) == set()


def test_bulk_group_of_nothing(ptx: Any) -> None:
    run(ptx, "cp.async.bulk.commit_group;", 32, torch.zeros(4), 4)
    assert kinds(ptx) == set()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"FENCE": ""}, {"proxy-fence"}),
        ({"SYNC": ""}, {"race-shared"}),
        ({"WAIT": ""}, {"race-shared"}),
        ({"AGAIN": ""}, {"race-shared"}),
        ({"COMMIT": ""}, {"race-shared", "async-copy"}),
    ],
)
def test_bulk_store_without(ptx: Any, changes: dict[str, str], expected: set[str]) -> None:
    run(ptx, filled(STORE, STORE_PARTS, **changes), 128, torch.zeros(4), 128)
    found = kinds(ptx)
    assert found & expected, f"reported {found}"


# A warpgroup fills a 64x16 and an 8x16 operand of bfloat16 (rows of 32 bytes, swizzled) and
# multiplies them.
WGMMA = """
.reg .b64 %a, %b; .reg .f32 %d<4>;
FILL
FENCE
SYNC
shr.u32 %r10, %r2, 4; cvt.u64.u32 %rd10, %r10; or.b64 %a, %rd10, 0xC000001000000000;
add.s32 %r11, %r2, 2048; shr.u32 %r11, %r11, 4; cvt.u64.u32 %rd11, %r11;
or.b64 %b, %rd11, 0xC000001000000000;
mov.f32 %d0, 0f00000000; mov.f32 %d1, %d0; mov.f32 %d2, %d0; mov.f32 %d3, %d0;
setp.ne.u32 %p3, %r1, %r1;
ORDER
MULTIPLY
COMMIT
WAIT
AGAIN
mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd1, %rd5;
st.global.v4.f32 [%rd6], {%d0, %d1, %d2, %d3};
"""
WGMMA_PARTS = {
    # 16 words a thread of zeros would do for no result; bfloat16 1.0 everywhere makes every sum 16.
    "FILL": "shl.b32 %r12, %r1, 4; add.s32 %r12, %r12, %r2; mov.u32 %r13, 0x3f803f80;"
    "st.shared.v4.b32 [%r12], {%r13, %r13, %r13, %r13};"
    "st.shared.v4.b32 [%r12+2048], {%r13, %r13, %r13, %r13};",
    "FENCE": "fence.proxy.async.shared::cta;",
    "SYNC": "bar.sync 0;",
    "ORDER": "wgmma.fence.sync.aligned;",
    "MULTIPLY": "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    " {%d0, %d1, %d2, %d3}, %a, %b, %p3, 1, 1, 0, 0;",
    "COMMIT": "wgmma.commit_group.sync.aligned;",
    "WAIT": "wgmma.wait_group.sync.aligned 0;",
    "AGAIN": "",
}


def test_wgmma(ptx: Any) -> None:
    got = run(ptx, filled(WGMMA, WGMMA_PARTS), 128, torch.zeros(4), 512)
    assert ptx.core.reports() == []
    assert got.tolist() == [16.0] * 512


@pytest.mark.parametrize(
    ("changes", "threads", "expected"),
    [
        ({"FENCE": ""}, 128, {"proxy-fence"}),
        ({"SYNC": ""}, 128, {"race-shared", "uninit-shared"}),
        ({"ORDER": ""}, 128, {"wgmma"}),
        ({"WAIT": ""}, 128, {"wgmma"}),
        ({"WAIT": "wgmma.wait_group.sync.aligned 1;"}, 128, {"wgmma"}),
        ({"COMMIT": ""}, 128, {"wgmma"}),
        # Accumulators written between two products without a fence.
        ({"AGAIN": "mov.f32 %d0, 0f3F800000; setp.eq.u32 %p3, %r1, %r1;"
          + "".join(WGMMA_PARTS[p] for p in ("MULTIPLY", "COMMIT", "WAIT"))}, 128, {"wgmma"}),
        # The operand is written while it may still be read.
        ({"WAIT": "st.shared.b32 [%r5], %r1; wgmma.wait_group.sync.aligned 0;"}, 128,
         {"race-shared"}),
        ({}, 96, {"wgmma"}),
    ],
)  # fmt: skip
def test_wgmma_without(ptx: Any, changes: dict[str, str], threads: int, expected: set[str]) -> None:
    run(ptx, filled(WGMMA, WGMMA_PARTS, **changes), threads, torch.zeros(4), 512)
    found = kinds(ptx)
    assert found & expected, f"reported {found}"


# Copies 16 KiB of operands, multiplies, and stores the 16 accumulators of each thread.
MULTIPLY = """
.reg .b64 %a, %b; .reg .f32 %d<16>;
.shared .align 1024 .b8 operands[16384];
mov.u32 %r10, operands; shl.b32 %r11, %r1, 4; add.s32 %r12, %r10, %r11;
mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd2, %rd5;
COPY
fence.proxy.async.shared::cta;
bar.sync 0;
shr.u32 %r13, %r10, 4; cvt.u64.u32 %rd7, %r13;
add.s64 %a, %rd7, A; add.s64 %b, %rd7, B;
ZERO
setp.ne.u32 %p3, %r1, %r1;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {ACCUMULATORS}, %a, %b, %p3, 1, 1, TRANSPOSED;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
mul.wide.u32 %rd8, %r1, 64; add.s64 %rd9, %rd1, %rd8;
STORE
"""
ACCUMULATORS = [f"%d{r}" for r in range(16)]
B_AT = 8192


def place(row: int, k: int, swizzle: int, transposed: bool) -> int:
    """The byte at which an operand has (row, k), of 16 columns: CUTLASS's canonical layouts
    (make_gmma_desc), groups of eight lines one after another."""
    line, along = (k, 2 * row) if transposed else (row, 2 * k)
    at = line // 8 * 8 * swizzle + line % 8 * swizzle + along % swizzle
    at += along // swizzle * 16 * swizzle  # behind both groups of the 16 lines along k
    return at ^ (at >> 3 & swizzle - 16)


def descriptor(at: int, swizzle: int) -> int:
    mode = {128: 1, 64: 2, 32: 3}[swizzle]
    return at >> 4 | swizzle << 16 | (8 * swizzle >> 4) << 32 | mode << 62


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("transposed_b", [False, True], ids=["b-along-k", "b-along-n"])
@pytest.mark.parametrize("transposed_a", [False, True], ids=["a-along-k", "a-along-m"])
def test_wgmma_operands(ptx: Any, transposed_a: bool, transposed_b: bool, swizzle: int) -> None:
    """Operands along k and across it; narrow swizzles need more than one line for 64 of m."""
    a, b = torch.randn(64, 16).bfloat16(), torch.randn(32, 16).bfloat16()
    image = torch.zeros(8192, dtype=torch.bfloat16)
    for values, transposed, start in ((a, transposed_a, 0), (b, transposed_b, B_AT)):
        for row in range(values.shape[0]):
            for k in range(16):
                image[(start + place(row, k, swizzle, transposed)) // 2] = values[row, k]
    lines = {
        "COPY": "\n".join(
            f"ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd6+{at}];"
            f"st.shared.v4.b32 [%r12+{at}], {{%r20, %r21, %r22, %r23}};"
            for at in range(0, 16384, 2048)
        ),
        "A": hex(descriptor(0, swizzle)),
        "B": hex(descriptor(B_AT, swizzle)),
        "ZERO": "".join(f"mov.f32 {d}, 0f00000000;" for d in ACCUMULATORS),
        "STORE": "".join(f"st.global.f32 [%rd9+{4 * r}], {d};" for r, d in enumerate(ACCUMULATORS)),
        "TRANSPOSED": f"{int(transposed_a)}, {int(transposed_b)}",
    }
    body = MULTIPLY.replace("{ACCUMULATORS}", f"{{{', '.join(ACCUMULATORS)}}}")
    body = re.sub(r"\b(COPY|A|B|ZERO|STORE|TRANSPOSED)\b", lambda m: lines[m[1]], body)
    stored = run(ptx, body, 128, image, 2048).view(4, 8, 4, 4, 2, 2)
    assert kinds(ptx) == set()
    # warp, lane / 4, lane % 4; columns / 8, half of the rows, column of a pair
    got = stored.permute(0, 4, 1, 3, 2, 5).reshape(64, 32)
    want = a.double() @ b.double().t()
    assert torch.allclose(got.double(), want, rtol=1e-6, atol=1e-6)


def test_elect_mapa_and_clusters_of_one(ptx: Any) -> None:
    body = """
    .reg .pred %e;
    elect.sync %r10|%e, -1;
    selp.u32 %r11, 1, 0, %e;
    mapa.shared::cluster.u32 %r12, %r2, 0;
    mov.u32 %r13, %cluster_nctarank;
    mov.u32 %r14, %cluster_ctarank;
    st.shared.u32 [%r5], %r11;
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    setmaxnreg.inc.sync.aligned.u32 232;
    griddepcontrol.wait;
    ld.shared.u32 %r15, [%r12];
    add.u32 %r15, %r15, %r13; add.u32 %r15, %r15, %r14; add.u32 %r15, %r15, %r10;
    cvt.rn.f32.u32 %f1, %r15; st.global.f32 [%rd4], %f1;
    """
    got = run(ptx, body, 64, torch.zeros(4), 64)
    assert kinds(ptx) == set()
    assert got.tolist() == [2.0] * 64
    run(ptx, body.replace("barrier.cluster.wait.acquire.aligned;", ""), 64, torch.zeros(4), 64)
    assert "race-shared" in kinds(ptx)


@pytest.mark.parametrize(
    "text",
    [
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1,"
        " 1, 1;",
        "cp.async.bulk.prefetch.L2.global [%rd2], 512;",
        "fence.proxy.tensormap::generic.release.gpu;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r2], 512;",
        "tcgen05.fence::before_thread_sync;",
    ],
)
def test_refuses_what_it_does_not_know(ptx: Any, text: str) -> None:
    run(ptx, text, 32, torch.zeros(4), 32)
    ((kind, _, what),) = ptx.core.reports()
    assert kind == "ptx"
    assert f"not emulated: {text.split()[0].rstrip(';')}" in what
