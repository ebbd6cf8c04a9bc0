"""Write cpp/src/cpu/unicode_ranges.inc: which code points the pre-tokenizer's classes hold.

    python cpp/tools/unicode_ranges.py > cpp/src/cpu/unicode_ranges.inc

The classes are asked of the `tokenizers` library, because it is what our encoder must agree with;
`tiktoken` 0.14 puts every code point into the same classes as `tokenizers` 0.23.
tests/data/test_bytelevel_exact.py checks the table against the installed version.
"""

from __future__ import annotations

import tokenizers
from tokenizers import Regex, normalizers

# Bit → regular expression. Keep in step with cpp/include/fastllm/unicode_class.hpp.
CLASSES = {
    1: r"\p{L}",
    2: r"\p{N}",
    4: r"\s",
    16: r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    32: r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
}


def main() -> None:
    removers = {bit: normalizers.Replace(Regex(p), "") for bit, p in CLASSES.items()}
    ranges: list[tuple[int, int, int]] = []
    for cp in range(0x110000):
        if 0xD800 <= cp < 0xE000:
            continue
        text = chr(cp)
        bits = sum(bit for bit, remover in removers.items() if not remover.normalize_str(text))
        if bits == 0:
            continue
        if ranges and ranges[-1][1] == cp - 1 and ranges[-1][2] == bits:
            ranges[-1] = (ranges[-1][0], cp, bits)
        else:
            ranges.append((cp, cp, bits))
    version = f"tokenizers {tokenizers.__version__}"
    print(f"// Made by cpp/tools/unicode_ranges.py with {version}: first, last, classes.")
    line = ""
    for first, last, bits in ranges:
        item = f"{{0x{first:X}, 0x{last:X}, {bits}}},"
        if len(line) + len(item) > 98:
            print(line.strip())
            line = ""
        line += " " + item
    print(line.strip())


if __name__ == "__main__":
    main()
