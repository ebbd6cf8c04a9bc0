"""Every kind of input gives what plain JSONL gives; damaged ones are named, never cut short."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import random
import re
import struct
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm_core import InputError, write_json_lines
from fastllm_data import IndexedDataset, UserError
from fastllm_data import tokenize as tokenize_module
from fastllm_data.inputs import find_sources
from fastllm_data.parquet import _lines as parquet_lines  # pyright: ignore[reportPrivateUsage]
from fastllm_data.places import Places
from fastllm_data.tokenize import TokenizeOptions, tokenize
from fastllm_data.tokenizer import load_tokenizer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = [f"fox {i} naïve 世界\nover" * (i % 9) for i in range(700)] + ["lazy dog " * 9000]


def jsonl(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"text": t, "n": 1}) + "\n" for t in texts).encode()


def run(model: Path, out: Path, *inputs: Path | str, **changed: object) -> bytes:
    options = TokenizeOptions(
        inputs=tuple(map(str, inputs)),
        tokenizer=model,
        out=out,
        append_eod=True,
        workers=2,
        **changed,  # pyright: ignore[reportArgumentType]
    )
    tokenize(options)
    prefix = f"{out}_{options.keys[0]}_document"
    return Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.idx").read_bytes()


@pytest.fixture(scope="module")
def expected(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("expected")
    (folder / "in.jsonl").write_bytes(jsonl())
    return run(small_model, folder / "out", folder / "in.jsonl")


def write_parquet(path: Path, rows: list[dict[str, object]], **options: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'fastllm-data[parquet]'")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("frames", [1, 3])
def test_compressed(
    kind: str, frames: int, expected: bytes, small_model: Path, tmp_path: Path
) -> None:
    content = jsonl()
    compress = gzip.compress if kind == "gz" else zstd.compress
    step = len(content) // frames + 1  # frames end anywhere, even in the middle of a line
    cuts = [compress(content[i : i + step]) for i in range(0, len(content), step)]
    (tmp_path / f"x.jsonl.{kind}").write_bytes(b"".join(cuts))
    assert run(small_model, tmp_path / "c", tmp_path / f"x.jsonl.{kind}") == expected


@pytest.mark.parametrize("kind", ["", "gz", "zst"])
def test_standard_input_is_known_by_its_content(
    kind: str, expected: bytes, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress = {"": bytes, "gz": gzip.compress, "zst": zstd.compress}[kind]
    stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(compress(jsonl()))))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdin", stream)
    assert run(small_model, tmp_path / "c", "-") == expected


def test_gzip_without_isal(
    expected: bytes, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "isal.igzip", None)
    (tmp_path / "x.gz").write_bytes(gzip.compress(jsonl()))
    assert run(small_model, tmp_path / "c", tmp_path / "x.gz") == expected


@pytest.mark.parametrize("isal", [True, False])
@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_cut_anywhere_is_an_error(
    kind: str, isal: bool, tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that lost its end never passes for a shorter one: every length, two frames."""
    if not isal:
        monkeypatch.setitem(sys.modules, "isal.igzip", None)
    from fastllm_data.streams import open_source

    compress = gzip.compress if kind == "gz" else zstd.compress
    first, second = (compress(jsonl(TEXTS[i : i + 5])) for i in (3, 20))
    path = tmp_path / f"x.{kind}"
    whole = first + second
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        (source,) = find_sources((str(path),))
        if size == len(first):  # a whole file
            continue
        with (
            pytest.raises(UserError, match=rf"x\.{kind}: (damaged|empty, so not)"),
            open_source(source) as stream,
        ):
            stream.read()
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="Compressed file ended"):
        run(small_model, tmp_path / "c", path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_parquet(expected: bytes, small_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"n": 1, "text": t} for t in TEXTS]
    path = write_parquet(tmp_path / "x.parquet", rows, row_group_size=150)
    assert run(small_model, tmp_path / "c", path) == expected
    path.rename(tmp_path / "renamed")  # known by its content
    assert run(small_model, tmp_path / "d", tmp_path / "renamed") == expected


def test_parquet_dictionary_lists_and_nulls(small_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": ["a fox", "", "a dog"]}, {"text": []}]
    path = write_parquet(tmp_path / "x.parquet", rows, use_dictionary=True)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(small_model, tmp_path / "a", path) == run(
        small_model, tmp_path / "b", tmp_path / "x.jsonl"
    )
    write_parquet(path, [{"text": "a"}, {"text": None}])
    with pytest.raises(UserError, match=r'x.parquet:2: field "text" is null'):
        run(small_model, tmp_path / "c", path)


def test_parquet_text_that_is_not_utf8_is_a_bad_row(small_model: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'fastllm-data[parquet]'")
    pq = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([b"good", b"bad \xff", b"good"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pyarrow.table({"text": text}), tmp_path / "x.parquet")
    run(small_model, tmp_path / "c", tmp_path / "x.parquet", on_error="skip")
    assert IndexedDataset(tmp_path / "c_text_document").documents == 2
    assert "x.parquet:2: column 15: not UTF-8" in (tmp_path / "c.errors.txt").read_text()


TRICKY = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from('"\\\b\f\n\r\t\x00\x1f\x7f é世😀'))
)


@given(st.lists(st.tuples(st.none() | TRICKY, TRICKY), max_size=20), st.booleans(), st.data())
def test_columns_of_strings_are_the_lines_that_json_writes(
    rows: list[tuple[str | None, str]], wide: bool, data: st.DataObject
) -> None:
    arrow = pytest.importorskip("pyarrow", reason="pip install 'fastllm-data[parquet]'")
    kind = arrow.large_string() if wide else arrow.string()
    columns = [arrow.array(column, kind) for column in zip(*rows, strict=True)] or [
        arrow.array([], kind)
    ] * 2
    first = data.draw(st.integers(0, len(rows)))
    batch = arrow.record_batch(columns, names=["text", 'a "b"']).slice(first)
    expected = [json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist()]
    assert parquet_lines(batch, arrow) == "".join(expected).encode()


def test_columns_whose_buffers_are_too_short_are_refused() -> None:
    def lines(first: int, rows: int, *ends: int, validity: bytes | None = None) -> bytes:
        column = (validity, struct.pack(f"<{len(ends)}i", *ends), b"abc", first, False)
        return write_json_lines(["t"], [column], rows)

    assert lines(1, 1, 0, 1, 3) == b'{"t": "bc"}\n'
    with pytest.raises(InputError, match="fewer offsets than rows"):
        lines(1, 2, 0, 1, 3)
    with pytest.raises(InputError, match="offsets out of its data"):
        lines(0, 2, 0, 1, 4)
    with pytest.raises(InputError, match="offsets out of its data"):
        lines(0, 2, 0, 2, 1)
    with pytest.raises(InputError, match="short validity bitmap"):
        lines(0, 9, *[0] * 10, validity=b"\xff")
    with pytest.raises(InputError, match="a key is needed for each column"):
        write_json_lines(["a", "b"], [(None, bytes(8), None, 0, False)], 1)


def test_damaged_parquet(small_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"n": 1, "text": t} for t in TEXTS]
    path = write_parquet(tmp_path / "x.parquet", rows, row_group_size=150)
    whole = path.read_bytes()
    for content in (whole[:-40], whole[: len(whole) // 2], b"PAR1", b"PAR1" + bytes(50)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.parquet: row 1: damaged Parquet"):
            run(small_model, tmp_path / "c", path)
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"no column 'body'") as caught:
        run(small_model, tmp_path / "c", path, keys=("body",))
    assert caught.value.hint == "its columns: n, text"
    with pytest.raises(UserError, match="column 'n' holds int64, not strings"):
        run(small_model, tmp_path / "c", path, keys=("n",))
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]


def test_text_formats(small_model: Path, tmp_path: Path) -> None:
    reference = load_tokenizer(small_model).reference
    content = "\ufeffone fox\r\n\r\ntwo foxes\n  three\n \n\n12 dogs\nnaïve 世界"
    (tmp_path / "x.txt").write_bytes(content.encode())
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress(b'a "quoted" \\ text\twith\x01\nlines\n'))
    cases = {
        "text-line": ["one fox", "", "two foxes", "  three", " ", "", "12 dogs", "naïve 世界"],
        "text-paragraph": ["one fox", "two foxes\n  three", "12 dogs\nnaïve 世界"],
        "text-file": [content.removeprefix("\ufeff"), 'a "quoted" \\ text\twith\x01\nlines\n'],
    }
    for form, texts in cases.items():
        inputs = [tmp_path / "x.txt"]
        if form == "text-file":
            inputs.append(tmp_path / "y.txt.gz")
        run(small_model, tmp_path / form, *inputs, form=form)
        made = IndexedDataset(tmp_path / f"{form}_text_document")
        ids = [[*i, 2] if i else [] for i in reference.encode(texts)]
        assert [made.document(d).tolist() for d in range(made.documents)] == ids, form
    with pytest.raises(UserError, match="does not say where a document ends"):
        run(small_model, tmp_path / "c", tmp_path / "x.txt")
    with pytest.raises(UserError, match="one text a document"):
        run(small_model, tmp_path / "c", tmp_path / "x.txt", form="text-line", keys=("a", "b"))


def test_bad_text_is_named(small_model: Path, tmp_path: Path) -> None:
    for i, content in enumerate((b"good", b"bad \xff", b"good")):
        (tmp_path / f"{i}.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"1\.txt:1: column 15: not UTF-8"):
        run(small_model, tmp_path / "c", tmp_path / "?.txt", form="text-file")
    (tmp_path / "p.txt").write_bytes(b"a\n\nb\n\n\xfe\n")
    with pytest.raises(UserError, match=r"p\.txt:3: column 11: not UTF-8"):
        run(small_model, tmp_path / "c", tmp_path / "p.txt", form="text-paragraph")


def test_folders(
    expected: bytes, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = jsonl().splitlines(keepends=True)
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.jsonl").write_bytes(b"".join(lines[:100]))
    (folder / "b" / "c.jsonl.zst").write_bytes(zstd.compress(b"".join(lines[100:300])))
    (folder / "d.json.gz").write_bytes(gzip.compress(b"".join(lines[300:])))
    (folder / ".hidden" / "e.jsonl").write_bytes(lines[0])
    (folder / "README").write_text("not data")
    assert run(small_model, tmp_path / "c", folder) == expected
    assert "1 other files are passed over, like" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no JSONL or Parquet files in this folder"):
        run(small_model, tmp_path / "d", tmp_path / "empty")


def test_a_file_that_is_not_what_it_says(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(gzip.compress(jsonl(TEXTS[:5])))  # known by its content
    run(small_model, tmp_path / "a", tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl.gz").write_bytes(jsonl(TEXTS[:5]))
    with pytest.raises(UserError, match="damaged gzip data: Not a gzipped file"):
        run(small_model, tmp_path / "b", tmp_path / "y.jsonl.gz")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files, with ranges as real servers do; ``/cut/…`` loses its connection half way."""

    def do_GET(self) -> None:
        path = Path(self.directory) / self.path.rsplit("/", 1)[-1]
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        begin, end = 0, len(content)
        if found := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, end = int(found[1]), int(found[2] or len(content) - 1) + 1
        self.send_response(206 if found else 200)
        part = content[begin:end]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part[: len(part) // 2] if "/cut/" in self.path else part)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("fsspec", reason="pip install 'fastllm-data[remote]'")
    pytest.importorskip("aiohttp", reason="pip install 'fastllm-data[remote]'")
    (tmp_path / "www").mkdir()
    handler = partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def test_http(server: str, expected: bytes, small_model: Path, tmp_path: Path) -> None:
    www = tmp_path / "www"
    (www / "x.jsonl").write_bytes(jsonl())
    (www / "x.jsonl.zst").write_bytes(zstd.compress(jsonl()))
    write_parquet(www / "x.parquet", [{"n": 1, "text": t} for t in TEXTS])
    for name in ("x.jsonl", "x.jsonl.zst", "x.parquet"):
        assert run(small_model, tmp_path / name, f"{server}/{name}") == expected, name
    with pytest.raises(UserError, match=r"missing\.jsonl: cannot be read"):
        run(small_model, tmp_path / "c", f"{server}/missing.jsonl")
    with pytest.raises(UserError, match=r"cut/x\.jsonl: (reading stopped|ended after)"):
        run(small_model, tmp_path / "c", f"{server}/cut/x.jsonl")
    assert not list(tmp_path.glob("c*"))


def test_remote_patterns(expected: bytes, small_model: Path, tmp_path: Path) -> None:
    """Through fsspec's file system in memory, which stands for s3 and the like."""
    fsspec = pytest.importorskip("fsspec", reason="pip install 'fastllm-data[remote]'")
    lines = jsonl().splitlines(keepends=True)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", b"".join(lines[:300]))
    memory.pipe("/bucket/b.jsonl.gz", gzip.compress(b"".join(lines[300:])))
    assert run(small_model, tmp_path / "c", "memory://bucket/*.jsonl*") == expected
    with pytest.raises(UserError, match="no such file"):
        run(small_model, tmp_path / "d", "memory://bucket/*.parquet")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.zst", "x.parquet", "x.txt", "files"])
def test_every_kind_goes_on_from_a_checkpoint(
    name: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = {"x.txt": "text-paragraph", "files": "text-file"}.get(name, "auto")
    texts = [t or "empty" for t in TEXTS]
    path = tmp_path / name
    if name == "x.jsonl":
        path.write_bytes(jsonl(texts))
    elif name == "x.jsonl.zst":
        path.write_bytes(zstd.compress(jsonl(texts)))
    elif name == "x.parquet":
        write_parquet(path, [{"text": t} for t in texts], row_group_size=90)
    elif name == "x.txt":
        path.write_text("\n\n".join(texts))
    else:
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:04d}").write_text(text)
    from fastllm_data import documents, parquet, streams

    for module in (documents, streams):
        monkeypatch.setattr(module, "CHUNK", 2000)
    monkeypatch.setattr(parquet, "BATCH_BYTES", 2000)
    whole = run(small_model, tmp_path / "whole", path, form=form)
    real = tokenize_module.Checkpoint.save
    saves = 0

    def save_and_die(self: tokenize_module.Checkpoint, work: Path) -> None:
        nonlocal saves
        real(self, work)
        saves += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize_module.Checkpoint, "save", save_and_die)
    made = b""
    while not made:
        try:
            made = run(
                small_model, tmp_path / "cut", path, form=form, resume=True, checkpoint_bytes=3000
            )
        except KeyboardInterrupt:
            assert saves < 400
    assert saves > 10
    assert made == whole


def test_changed_inputs_are_not_gone_on_with(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl())

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_module, "_write_sidecar", die)
        with pytest.raises(KeyboardInterrupt):
            run(small_model, tmp_path / "c", path, checkpoint_bytes=5000)
    content = bytearray(path.read_bytes())
    content[200:204] = b"5678"  # of the same size
    path.write_bytes(content)
    with pytest.raises(UserError, match="other inputs"):
        run(small_model, tmp_path / "c", path, checkpoint_bytes=5000, resume=True)


def test_lines_of_a_part_are_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    from dataclasses import replace

    rng = random.Random(3)
    content = b"".join(b"x" * rng.randrange(9) + b"\n" for _ in range(60))
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    (source,) = find_sources((str(path),))
    for begin in range(1, len(content)):
        first = (
            content.find(b"\n", begin - 1) + 1
        )  # of the first line that starts at begin or later
        lines_before = content[:first].count(b"\n")
        assert Places().of(replace(source, begin=begin), 4) == (str(path), 4 + lines_before)
