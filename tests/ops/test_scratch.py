"""Temporary memory of operators: apart from each other, kept, and one a thread."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastllm_train.ops.scratch import scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_are_apart_and_as_asked_for(dtype: torch.dtype) -> None:
    shapes = ((3, 5), (0, 4), (7,), (2, 2, 9))
    tensors = scratch(torch.empty(0, dtype=dtype), *shapes)
    assert [tuple(t.shape) for t in tensors] == list(shapes)
    for i, t in enumerate(tensors):
        assert t.dtype == dtype
        assert t.is_contiguous()
        assert t.data_ptr() % 64 == 0
        t.fill_(i)
    assert all((t == i).all() for i, t in enumerate(tensors))


def test_memory_is_kept_and_grows() -> None:
    like = torch.empty(0)
    (large,) = scratch(like, (1000,))
    address = large.data_ptr()
    assert [t.data_ptr() for t in scratch(like, (10,), (20,))] == [address, address + 64]
    (larger,) = scratch(like, (100_000,))
    larger.fill_(1.0)
    assert scratch(like, (1000,))[0].data_ptr() == larger.data_ptr()


def test_threads_have_memory_of_their_own() -> None:
    (mine,) = scratch(torch.empty(0), (1000,))
    theirs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: theirs.extend(scratch(torch.empty(0), (1000,))))
    thread.start()
    thread.join()
    mine.fill_(1.0)
    theirs[0].fill_(2.0)
    assert (mine == 1.0).all()


def test_who_follows_allocations_sees_them() -> None:
    with FakeTensorMode():
        like = torch.empty(0)
        first, second = (scratch(like, (10,))[0] for _ in range(2))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
