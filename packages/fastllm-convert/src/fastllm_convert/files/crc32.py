"""CRC-32: of bytes, of runs of zeros, and of two pieces computed apart (``combine``).

A CRC is a remainder modulo the polynomial P over GF(2), so appending n bytes multiplies it by
x^(8n) mod P. Bits are reflected as in zlib.
Method: Mark Adler's crc32_combine (zlib 1.2.12, crc32.c).
"""

from __future__ import annotations

from functools import lru_cache

# Intel's ISA-L folds 64 bytes at a time (many GB/s where zlib's tables give one to five). It has no
# wheels for every machine: there zlib does.
try:
    from isal.isal_zlib import crc32 as _crc32  # pyright: ignore[reportUnknownVariableType]
except ImportError:
    from zlib import crc32 as _crc32


def of(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """CRC-32 of ``data``, continuing from ``start``."""
    return _crc32(data, start)


_POLY = 0xEDB88320
_ONE = 1 << 31  # x^0, reflected


def _multiply(a: int, b: int) -> int:
    """a * b mod P."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLY if b & 1 else b >> 1
    return product


@lru_cache(maxsize=256)
def _power(nbytes: int) -> int:
    """x^(8 * nbytes) mod P, by repeated squaring."""
    result, square = _ONE, 1 << 23  # 1 << 23 is x^8
    while nbytes:
        if nbytes & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        nbytes >>= 1
    return result


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of A + B from those of A and of B (``second_bytes`` long)."""
    return _multiply(_power(second_bytes), first) ^ second


def of_zeros(nbytes: int) -> int:
    """CRC-32 of ``nbytes`` zero bytes."""
    return _multiply(_power(nbytes), 0xFFFFFFFF) ^ 0xFFFFFFFF
