"""The PTX emulator finds what it must: bugs planted in the kernels' PTX and in small kernels."""

from __future__ import annotations

import contextlib
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


@pytest.fixture
def ptx(emulated_ptx: Any) -> Iterator[Any]:
    """The backend; whatever a test replaces is put back."""
    core = emulated_ptx.core
    originals = {core.ptx_text(k) for k in core.ptx_kernels() if "fastllm" in k}
    yield emulated_ptx
    for text in originals:
        core.load_ptx(text)
    core.clear_reports()


def run(ptx: Any, body: str, threads: int = 32, blocks: int = 1, words: int = 64) -> torch.Tensor:
    """Runs a kernel whose %rd1 is a buffer of zeros and %r1 the thread; returns the buffer."""
    ptx.core.load_ptx(
        f"""{HEADER}
.visible .entry k(.param .u64 p) {{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<40>; .reg .f32 %f<8>; .reg .b64 %rd<8>;
.shared .align 16 .b8 s[512];
ld.param.u64 %rd1, [p];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
shl.b32 %r2, %r1, 2;
mov.u32 %r3, s;
add.s32 %r4, %r3, %r2;
{body}
ret; }}"""
    )
    buffer = ptx.put(torch.zeros(words, dtype=torch.float32))
    ptx.core.launch_ptx("k", [blocks], [threads], [struct.pack("<Q", buffer.pointer())])
    return ptx.get(buffer).view(torch.int32)


def kinds(ptx: Any) -> set[str]:
    found = {kind for kind, _, _ in ptx.core.reports()}
    ptx.core.clear_reports()
    return found


# Each is correct as it stands; the second text, in place of the first, is the bug.
PLANTED = {
    "barrier deleted": (
        "st.shared.u32 [%r4], %r1;\nBAR ld.shared.u32 %r5, [s];\nst.global.u32 [%rd3], %r5;",
        "BAR", "bar.sync 0;", "", {"race-shared"},
    ),
    "store out of bounds": (
        "st.global.u32 [%rd3+OFFSET], %r1;", "OFFSET", "0", "256", {"out-of-bounds"},
    ),
    "misaligned": ("st.global.u32 [%rd3+OFFSET], %r1;", "OFFSET", "0", "2", {"misaligned"}),
    "one word by all threads": (
        "ADDRESS st.global.u32 [%rd3], %r1;", "ADDRESS", "", "mov.u64 %rd3, %rd1;", {"race-global"},
    ),
    "atomic dropped": (
        "ATOMIC", "ATOMIC", "red.global.add.u32 [%rd1], 1;",
        "ld.global.u32 %r5, [%rd1]; add.s32 %r5, %r5, 1; st.global.u32 [%rd1], %r5;",
        {"race-global"},
    ),
    "shared memory read before it is written": (
        "STORE bar.warp.sync -1; ld.shared.u32 %r5, [%r4]; st.global.u32 [%rd3], %r5;",
        "STORE", "st.shared.u32 [%r4], %r1;", "", {"uninit-shared"},
    ),
    "bar.warp.sync deleted": (
        "st.shared.u32 [%r4], %r1;\nSYNC xor.b32 %r6, %r2, 4;\nadd.s32 %r6, %r6, %r3;\n"
        "ld.shared.u32 %r5, [%r6];\nst.global.u32 [%rd3], %r5;",
        "SYNC", "bar.warp.sync -1;", "", {"race-shared"},
    ),
    "barrier in a branch": (
        "setp.lt.u32 %p1, %r1, LIMIT;\n@!%p1 bra $over;\nbar.sync 0;\n$over:\n",
        "LIMIT", "64", "16", {"divergent-barrier", "barrier-after-exit"},
    ),
    "shuffle in a branch": (
        "setp.lt.u32 %p1, %r1, LIMIT;\n@!%p1 bra $over;\n"
        "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;\n$over:\nbar.warp.sync -1;",
        "LIMIT", "64", "16", {"warp-diverged"},
    ),
    "shuffle after a return": (
        "setp.ge.u32 %p1, %r1, LIMIT;\n@%p1 bra $out;\n"
        "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;\n$out:",
        "LIMIT", "64", "16", {"warp-mask"},
    ),
    "mask without the source": (
        "mov.u32 %r7, MASK;\nsetp.gt.u32 %p1, %r1, 15;\n@%p1 bra $over;\n"
        "shfl.sync.idx.b32 %r5, %r1, 20, 31, %r7;\n$over:\nbar.warp.sync -1;",
        "MASK", None, "0xffff", {"shuffle"},
    ),
    "cp.async not waited for": (
        "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;\nWAIT\n"
        "ld.shared.u32 %r5, [%r4];\nst.global.u32 [%rd3], %r5;",
        "WAIT", "cp.async.wait_group 0;", "", {"async-copy"},
    ),
    "cp.async waited for one group too late": (
        "cp.async.ca.shared.global [%r4], [%rd3], 4;\ncp.async.commit_group;\n"
        "cp.async.wait_group COUNT;\nld.shared.u32 %r5, [%r4];\ncp.async.wait_all;",
        "COUNT", "0", "1", {"async-copy"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_reported(ptx: Any, name: str) -> None:
    body, hole, right, wrong, expected = PLANTED[name]
    if right is not None:
        run(ptx, body.replace(hole, right))
        assert kinds(ptx) == set()
    run(ptx, body.replace(hole, wrong), threads=32)
    found = kinds(ptx)
    assert found & expected, f"reported {found}, expected one of {expected}"


def test_races_between_warps_and_blocks(ptx: Any) -> None:
    exchange = (
        "xor.b32 %r6, %r2, 128;\nadd.s32 %r6, %r6, %r3;\nst.shared.u32 [%r4], %r1;\n{}\n"
        "ld.shared.u32 %r5, [%r6];\nst.global.u32 [%rd3], %r5;"
    )
    got = run(ptx, exchange.format("bar.sync 0;"), threads=64)
    assert kinds(ptx) == set()
    assert got.tolist() == [i ^ 32 for i in range(64)]
    run(ptx, exchange.format("bar.warp.sync -1;"), threads=64)
    assert "race-shared" in kinds(ptx)
    run(ptx, "st.global.u32 [%rd3], %r1;", blocks=2)
    assert kinds(ptx) == {"race-global"}


def test_named_barriers_order_only_their_warps(ptx: Any) -> None:
    """Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2."""
    body = (
        "shr.u32 %r7, %r1, 6;\nadd.s32 %r7, %r7, 1;\nst.shared.u32 [%r4+{0}], %r1;\n"
        "bar.sync %r7, 64;\nxor.b32 %r6, %r2, {1};\nadd.s32 %r6, %r6, %r3;\n"
        "ld.shared.u32 %r5, [%r6+{0}];\nst.global.u32 [%rd3], %r5;"
    )
    got = run(ptx, body.format(0, 128), threads=128, words=128)
    assert kinds(ptx) == set()
    assert got.tolist() == [i ^ 32 for i in range(128)]
    run(ptx, body.format(0, 256), threads=128, words=128)
    assert kinds(ptx) & {"race-shared", "uninit-shared"}


def test_deadlock(ptx: Any) -> None:
    run(ptx, "bar.sync 1, 96;", threads=64)
    assert kinds(ptx) == {"deadlock"}


@pytest.mark.parametrize(
    "text",
    ["fma.rp.f32 %f1, %f2, %f3, %f4;", "tex.1d.v4.f32.s32 %r5, %r1;", "addc.u32 %r5, %r1, 1;"],
)
def test_unknown_instructions_are_refused_by_name_and_line(ptx: Any, text: str) -> None:
    run(ptx, text)
    ((kind, _, what),) = ptx.core.reports()
    assert kind == "ptx"
    assert re.search(r"PTX line 15: not emulated: " + re.escape(text.split()[0]), what)


def words(values: list[int]) -> list[int]:
    return [v & 0xFFFFFFFF for v in values]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sub.s32 %r5, %r1, 5;", lambda t: t - 5),
        ("mul.hi.s32 %r5, %r1, -3;", lambda t: (t * -3) >> 32),
        ("add.s32 %r6, %r1, 1; div.s32 %r5, -100, %r6;", lambda t: -(100 // (t + 1))),
        # 2^24 + t, rounded down to a multiple of 2.
        ("cvt.rn.f32.s32 %f1, %r1; fma.rm.f32 %f1, %f1, 0f3F800000, 0f4B800000; "
         "cvt.rzi.s32.f32 %r5, %f1;",
         lambda t: 2**24 + t // 2 * 2),
        ("lop3.b32 %r5, %r1, 12, 10, 0x96;", lambda t: t ^ 12 ^ 10),
        ("prmt.b32 %r5, %r1, 0x44332211, 0x5410;", lambda t: (t & 0xFFFF) | 0x22110000),
        ("shf.l.wrap.b32 %r5, 0x80000001, %r1, 1;", lambda t: (t << 1) | 1),
        ("bfe.u32 %r5, %r1, 1, 3;", lambda t: t >> 1 & 7),
        ("bfi.b32 %r5, %r1, 0xff, 4, 2;", lambda t: (0xFF & ~0x30) | (t & 3) << 4),
        ("brev.b32 %r5, %r1;", lambda t: int(f"{t:032b}"[::-1], 2)),
        ("clz.b32 %r5, %r1;", lambda t: 32 - t.bit_length()),
        ("bfind.u32 %r5, %r1;", lambda t: t.bit_length() - 1),
        ("bfind.shiftamt.u32 %r5, %r1;", lambda t: 32 - t.bit_length() if t else -1),
        ("shr.s32 %r5, -64, %r1;", lambda t: -64 >> t),
        ("setp.lt.and.s32 %p1|%p2, %r1, 9, %p3; selp.u32 %r5, 1, 2, %p1;", lambda _: 2),
        ("vote.sync.ballot.b32 %r5, %p3, -1;", lambda _: 0),
        ("redux.sync.max.s32 %r5, %r1, -1;", lambda _: 31),
        ("shfl.sync.up.b32 %r5, %r1, 3, 0, -1;", lambda t: t if t < 3 else t - 3),
        ("shfl.sync.down.b32 %r5, %r1, 3, 0x181f, -1;", lambda t: t + 3 if t % 8 < 5 else t),
        ("cvt.s32.s8 %r5, %r6;", lambda _: 0),
        ("cvt.rn.f32.s32 %f1, %r1; mov.b32 %r5, %f1;",
         lambda t: struct.unpack("<I", struct.pack("<f", t))[0]),
        ("cvt.rn.f32.s32 %f1, %r1; div.rn.f32 %f1, %f1, 0f40400000; cvt.rni.s32.f32 %r5, %f1;",
         lambda t: round(t / 3)),
        ("mov.b32 {%h1, %h2}, 0x12345678; mov.b32 %r5, {%h2, %h1};", lambda _: 0x56781234),
    ],
)  # fmt: skip
def test_values_of_instructions(ptx: Any, text: str, expected: Callable[[int], int]) -> None:
    got = run(ptx, f"{text}\nst.global.u32 [%rd3], %r5;")
    assert kinds(ptx) == set()
    assert words(got.tolist()[:32]) == words([expected(t) for t in range(32)])


# --- bugs in the PTX of the operators themselves --------------------------------------------------


def test_every_mutant_of_rmsnorm_is_found(emulated_ptx_module: Any) -> None:
    command = [sys.executable, "scripts/ptx_mutation_score.py", "--op", "rmsnorm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = re.search(r"^(\d+) mutants: (\d+) reported", done.stdout, re.MULTILINE)
    assert counted is not None
    assert int(counted[2]) > 60


def rmsnorm_fwd(ptx: Any, rows: int = 3, cols: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, cols, generator=generator)
    y = ptx.empty((rows, cols), torch.float32)
    rstd = ptx.empty((rows,), torch.float32)
    ptx.core.rmsnorm_fwd(ptx.put(x), None, ptx.put(torch.ones(cols)), y, None, rstd, 1e-6)
    return ptx.get(y)


def mutate(ptx: Any, kernel: str, pattern: str, change: str, nth: int = 0) -> None:
    """Replaces the n-th match of the pattern within the kernel of that name."""
    (name,) = [k for k in ptx.core.ptx_kernels() if re.search(kernel, k)]
    text = ptx.core.ptx_text(name)
    begin = text.index(f".entry {name}(")
    end = text.find(".entry ", begin + 1)
    body = text[begin : end if end > 0 else None]
    found = list(re.finditer(pattern, body))[nth]
    body = body[: found.start()] + found.expand(change) + body[found.end() :]
    ptx.core.load_ptx(text[:begin] + body + (text[end:] if end > 0 else ""))


@pytest.mark.parametrize(
    ("pattern", "change", "expected"),
    [
        (r"bar\.sync\s+0;", "", {"race-shared", "uninit-shared"}),
        (r"st\.shared\.f32 (.*), %f\d+;", r"", {"uninit-shared"}),
        # The offset between the accesses of a thread, which is what bounds its loop.
        (r"ld\.global(\.nc)?\.v4\.u32 (.*), \[(%rd\d+)\];", r"ld.global.v4.u32 \2, [\3+65536];",
         {"out-of-bounds"}),
        (r"ld\.global(\.nc)?\.v4\.u32 (.*), \[(%rd\d+)\];", r"ld.global.v4.u32 \2, [\3+4];",
         {"misaligned"}),
    ],
)  # fmt: skip
def test_bugs_planted_in_rmsnorm(ptx: Any, pattern: str, change: str, expected: set[str]) -> None:
    rmsnorm_fwd(ptx)
    assert kinds(ptx) == set()
    mutate(ptx, r"rmsnorm_fwd_kernelIfLi4", pattern, change)
    abandoned = expected & {"out-of-bounds", "misaligned"}
    with pytest.raises(RuntimeError) if abandoned else contextlib.nullcontext():
        rmsnorm_fwd(ptx)
    found = kinds(ptx)
    assert found & expected, f"reported {found}"
