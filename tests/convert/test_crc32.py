"""CRC-32 of concatenations and zeros against zlib."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from fastllm_convert.files import crc32


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine(a: bytes, b: bytes) -> None:
    assert crc32.combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@given(st.integers(0, 5000))
def test_zeros(count: int) -> None:
    assert crc32.of_zeros(count) == zlib.crc32(bytes(count))


def test_zeros_of_a_file_no_memory_holds() -> None:
    half = crc32.of_zeros(1 << 39)
    assert crc32.combine(half, half, 1 << 39) == crc32.of_zeros(1 << 40)
