"""Write a JSONL corpus from text that every Python installation carries.

Usage: python make_corpus.py OUT.jsonl [--megabytes 8]

Two kinds of documents, from the standard library of the running interpreter: whole source files,
and the docstrings of one module. Deterministic for one Python version: files in sorted order.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Not always installed (Debian packages them apart), so a corpus with them would differ by machine.
SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "__pycache__",
}


def source_files(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(set(names) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def docstrings(source: str) -> Iterator[str]:
    """``name`` and cleaned docstring of the module, its classes and functions."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                name = "" if isinstance(node, ast.Module) else f"{node.name}\n"
                yield f"{name}{text}\n"


def documents(root: Path) -> Iterator[dict[str, str]]:
    for path in source_files(root):
        try:
            source = path.read_text(encoding="utf-8")
            notes = "\n".join(docstrings(source))
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few library files are deliberately neither UTF-8 nor parseable
        name = path.relative_to(root).as_posix()
        if source.strip():
            yield {"text": source, "source": name}
        if notes:
            yield {"text": notes, "source": f"{name}#docstrings"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=float, default=8.0, help="stop after this much text")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_suffix(".partial")
    count = written = 0
    with partial.open("w", encoding="utf-8") as out:
        for document in documents(Path(sysconfig.get_path("stdlib"))):
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
            count += 1
            written += len(document["text"].encode())
            if written > args.megabytes * 1e6:
                break
    partial.replace(args.out)
    print(f"{args.out}: {count} documents, {written / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
