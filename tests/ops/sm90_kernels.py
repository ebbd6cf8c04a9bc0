"""Kernels of sm_90a written by hand, for the tests of the PTX emulator."""

from __future__ import annotations

import struct
from typing import Any

import torch

HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n"

REGISTERS = """
.reg .pred %p<8>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<20>;
.shared .align 1024 .b8 tile[4096];
.shared .align 8 .b8 bar[16];
ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [in];
mov.u32 %r1, %tid.x; mov.u32 %r2, tile; mov.u32 %r3, bar;
shl.b32 %r4, %r1, 2; add.s32 %r5, %r2, %r4;
mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3;
setp.eq.u32 %p1, %r1, 0;
"""

WAIT = """{{ .reg .pred P; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 P, [%r3+{at}], {parity};
@P bra DONE; bra AGAIN; DONE: }}"""


def run(
    ptx: Any, body: str, threads: int, data: torch.Tensor, words: int, parameters: str = ""
) -> torch.Tensor:
    """Runs a kernel of the buffers out and in; returns out as float32."""
    ptx.core.load_ptx(
        f"{HEADER}.visible .entry k90(.param .u64 out, .param .u64 in{parameters})"
        f"{{{REGISTERS}{body}\nret;}}"
    )
    out, source = ptx.put(torch.zeros(words)), ptx.put(data)
    arguments = [struct.pack("<Q", a.pointer()) for a in (out, source)]
    ptx.core.launch_ptx("k90", [1], [threads], arguments)
    return ptx.get(out)


def kinds(ptx: Any) -> set[str]:
    found = {kind for kind, _, _ in ptx.core.reports()}
    ptx.core.clear_reports()
    return found


def filled(text: str, parts: dict[str, str], **changes: str) -> str:
    for name, part in (parts | changes).items():
        text = text.replace(name, part)
    return text
