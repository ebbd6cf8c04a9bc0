"""Memory of a step goes back to the system: after the first one, and then now and again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastllm_train import engine_step
from fastllm_train.engine_step import TRIM_EVERY, HeapTrim

# Blocks that malloc takes from its heap, not from the system one by one; the last one stays, so
# that the heap does not shrink by itself.
HELD = """
import ctypes
from fastllm_core import trim_heap

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

before = resident()
blocks = [libc.malloc(65536) for _ in range(1600)]
for block in blocks:
    libc.memset(block, 1, 65536)
for block in blocks[:-1]:
    libc.free(block)
freed = resident()
assert trim_heap()
print(freed - before, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_free_pages_between_blocks_go_back() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    freed, trimmed = map(float, done.stdout.split())
    assert freed > 90
    assert trimmed < 10


def test_when(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    for device, steps in (("cpu", [0, TRIM_EVERY, 2 * TRIM_EVERY]), ("cuda", [])):
        found.clear()
        trim = HeapTrim(torch.device(device))
        for step in range(2 * TRIM_EVERY + 1):
            monkeypatch.setattr(engine_step, "trim_heap", lambda step=step: found.append(step))
            trim.after_step()
        assert found == steps
