"""What every command keeps: help, exit codes 0/1/2, streams, one-line errors, a fast start.

The conventions are shared as this test, not as code: each package has its own ``__main__``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("planner", "data", "train", "convert")
HEAVY = {
    "torch",
    "numpy",
    "deepspeed",
    "transformers",
    "sentencepiece",
    "tokenizers",
    "safetensors",
    "jinja2",
    "pyarrow",
    "fsspec",
    "ray",
}
ROOT = Path(__file__).resolve().parents[2]


def cli(
    program: str, *args: str | Path, cwd: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "FASTLLM_DEBUG"}
    command = [sys.executable, "-m", f"fastllm_{program}", *(str(arg) for arg in args)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=env,
        timeout=120,
        input=stdin,
    )


@functools.cache
def verbs(program: str) -> tuple[str, ...]:
    """The subcommands that ``--help`` names."""
    lines = cli(program, "--help").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip() == "Commands:")
    found: list[str] = []
    for line in lines[start + 1 :]:
        if line.startswith("  ") and not line.startswith("   "):
            found.append(line.split()[0])
    assert found, f"fastllm-{program} --help lists no commands"
    return tuple(found)


def every_command() -> Iterator[tuple[str, ...]]:
    for program in PROGRAMS:
        yield (program,)
        yield from ((program, verb) for verb in verbs(program))


def assert_refused(done: subprocess.CompletedProcess[str], *needles: str) -> None:
    """Exit 2, nothing on stdout; ``error: …`` and ``hint: …`` are the last lines on stderr."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line.split(": ")[0] for line in lines if line.startswith(("error: ", "hint: "))]
    assert said == ["error", "hint"], done.stderr
    assert lines[-1].startswith("hint: "), done.stderr
    for needle in needles:
        assert needle in done.stderr, (needle, done.stderr)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_verb_has_help_with_an_example(program: str) -> None:
    for verb in ("", *verbs(program)):
        done = cli(program, *([verb] if verb else []), "--help")
        assert done.returncode == 0, (verb, done.stderr)
        assert done.stderr == "", (verb, done.stderr)
        assert f"fastllm-{program}" in done.stdout, verb
        assert "xample" in done.stdout, f"fastllm-{program} {verb} --help shows no example"
        widest = max(len(line) for line in done.stdout.splitlines())
        assert widest <= 100, (verb, widest)


@pytest.mark.parametrize("program", PROGRAMS)
def test_version(program: str) -> None:
    done = cli(program, "--version")
    assert done.returncode == 0
    assert "0.1." in done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_wrong_usage_is_one_line_and_exit_2(program: str) -> None:
    assert_refused(cli(program, "no-such-verb"), "no-such-verb")
    for verb in verbs(program):
        assert_refused(cli(program, verb, "--no-such-option"), "--no-such-option")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_nothing_heavy(program: str) -> None:
    for verb in ("", *verbs(program)):
        code = (
            f"import sys; from fastllm_{program}.__main__ import main\n"
            f"sys.argv = {['x', *([verb] if verb else []), '--help']!r}\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\n"
            f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == "[]", (verb, done.stderr)


# By verb: how it is called with a file, a name or a value that is not there.
MISSING: dict[str, dict[str, str]] = {
    "planner": {
        "plan": "--model missing/config.json --gpu H100-SXM --gpus 8",
        "estimate": "--model missing/config.json --gpu H100-SXM --gpus 8",
        "tflops": "--model missing/config.json --seq-len 9 --global-batch 1 --iter-time 1 --gpus 8",
        "calibrate": "missing",
        "validate": "missing",
        "classic": "--hidden missing",
        "report": "--model missing/config.json --gpu H100-SXM --gpus 8 --out out.html",
        "serve": "--port missing",
        "models": "missing",
        "gpus": "--missing",
    },
    "data": {
        "tokenize": "missing --tokenizer missing --out out",
        "preprocess": "--input missing --output-prefix out --tokenizer-type HFTokenizer "
        "--tokenizer-model missing",
        "tokenize-chat": "missing --tokenizer missing --out out",
        "train-tokenizer": "missing --vocab-size 500 --out out",
        "inspect": "missing",
        "decode": "missing --tokenizer missing",
        "stats": "missing",
        "merge": "missing --out out",
        "split": "missing --parts 2 --out out",
        "sample": "missing --count 2 --out out",
        "verify": "missing",
    },
    "train": {
        "run": "missing",
        "launch": "missing",
        "check": "missing",
        "report": "missing",
        "peak": "--dtype missing",
        "import-megatron": "missing",
    },
    "convert": {
        "run": "missing out --to hf",
        "plan": "missing --to hf",
        "inspect": "missing",
        "verify": "missing missing",
        "meta-to-hf": "--input-dir missing --output-dir out",
        "hf-to-megatron": "--load-dir missing --save-dir out",
        "deepspeed-to-megatron": "--input_folder missing --output_folder out",
        "deepspeed-to-hf": "--input_folder missing --output_folder out",
    },
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_missing_is_refused_by_every_verb(program: str, tmp_path: Path) -> None:
    assert set(MISSING[program]) == set(verbs(program))
    for verb, args in MISSING[program].items():
        assert_refused(cli(program, verb, *args.split(), cwd=tmp_path), "missing")
    assert list(tmp_path.iterdir()) == []


# By verb of those that write: how it is called with an output that cannot be.
UNWRITABLE: dict[str, str] = {
    "tokenize": "corpus.jsonl --tokenizer tok/tokenizer.model --out corpus.jsonl/out",
    "preprocess": "--input corpus.jsonl --output-prefix corpus.jsonl/out "
    "--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model tok/tokenizer.model",
    "train-tokenizer": "corpus.jsonl --vocab-size 300 --out corpus.jsonl/out",
    "merge": "data_text_document --out corpus.jsonl/out",
    "split": "data_text_document --parts 2 --out corpus.jsonl/out",
    "sample": "data_text_document --count 2 --out corpus.jsonl/out",
    "stats": "data_text_document --plot corpus.jsonl/out.svg",
}


def test_output_that_cannot_be_written_is_refused(corpus: Path) -> None:
    before = sorted(path.name for path in corpus.iterdir())
    for verb, args in UNWRITABLE.items():
        assert_refused(cli("data", verb, *args.split(), cwd=corpus), "corpus.jsonl/out")
    assert sorted(path.name for path in corpus.iterdir()) == before


@pytest.mark.parametrize("verb", ["inspect", "decode", "stats", "merge", "split", "sample"])
def test_what_is_no_dataset_is_refused(verb: str, corpus: Path, tmp_path: Path) -> None:
    """A text under a dataset's names, and a folder."""
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").write_text("neither index nor tokens\n" * 9)
    options = {
        "decode": ("--tokenizer", corpus / "tok/tokenizer.model"),
        "merge": ("--out", tmp_path / "out"),
        "split": ("--parts", "2", "--out", tmp_path / "out"),
        "sample": ("--count", "2", "--out", tmp_path / "out"),
    }.get(verb, ())
    assert_refused(cli("data", verb, tmp_path / "text", *options), "text.idx")
    assert_refused(cli("data", verb, tmp_path, *options), tmp_path.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.bin", "text.idx"]


@pytest.mark.parametrize(
    ("args", "needles"),
    [
        (("--model", "lama-2-7b", "--gpu", "H100-SXM", "--gpus", "8"), ("llama-2-7b",)),
        (("--model", "llama-2-7b", "--gpu", "H10-SXM", "--gpus", "8"), ("H100-SXM",)),
        (("--model", "llama-2-7b", "--gpu", "H100-SXM", "--gpus", "0"), ("0",)),
    ],
)
def test_planner_names_what_is_near(args: tuple[str, ...], needles: tuple[str, ...]) -> None:
    assert_refused(cli("planner", "plan", *args), *needles)


CLASSIC = (
    "classic --hidden 8192 --layers 80 --seq-len 4096 --vocab 32000 --nodes 6 --gpus-per-node 4 "
    "--gpu-memory 80 --batch-size 8 --tokens 0.7e9 --tflops 140"
)


@pytest.mark.parametrize(
    "command",
    [
        CLASSIC,
        "plan --model llama-2-7b --gpu H100-SXM --gpus 8 --global-batch 128 --tokens 1e11",
        "plan --model llama-10m --gpu cpu --gpus 2 --global-batch 16 --seq-len 256 --dtype fp32",
        "tflops --params 7e9 --seq-len 4096 --global-batch 128 --iter-time 6.8 --gpus 32",
    ],
)
def test_planner_json_is_one_object_alone_on_stdout(command: str) -> None:
    done = cli("planner", *command.split(), "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_the_answer_no_is_exit_1() -> None:
    args = "plan --model llama-2-70b --gpu RTX-4090 --gpus 1 --global-batch 8 --json".split()
    done = cli("planner", *args)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert isinstance(json.loads(done.stdout), dict)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL corpus of 60 documents, a 300-piece tokenizer, and a tokenized dataset."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the quick brown fox jumps over a lazy dog while seven wizards box".split()
    lines = [
        json.dumps({"text": " ".join(words[(i * k) % len(words)] for k in range(5 + i % 40))})
        for i in range(60)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    args = ["train-tokenizer", "corpus.jsonl", "--vocab-size", "300", "--out", "tok"]
    done = cli("data", *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    done = cli("data", *tokenize("corpus.jsonl", "data"), "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["documents"] == 60
    return folder


def tokenize(source: str, out: str) -> tuple[str, ...]:
    return ("tokenize", source, "--tokenizer", "tok/tokenizer.model", "--out", out)


@pytest.mark.parametrize(
    "command",
    [
        "inspect data_text_document",
        "verify data_text_document",
        "stats data_text_document",
        "merge data_text_document data_text_document --out merged",
        "split data_text_document --parts 3 --out split",
        "sample data_text_document --count 5 --out sampled",
        "tokenize corpus.jsonl --tokenizer tok/tokenizer.model --out sharded --shards 3",
    ],
)
def test_data_json_is_one_object_alone_on_stdout(command: str, corpus: Path) -> None:
    done = cli("data", *command.split(), "--json", cwd=corpus)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


@pytest.mark.parametrize(
    ("line", "needles"),
    [
        ("this is not JSON", (":61",)),
        ('{"title": "no text field"}', (":61", "text")),
        ('{"text": 7}', (":61",)),
        ('{"text": "cut sho', (":61",)),
    ],
)
def test_a_bad_jsonl_line_stops_with_its_place(
    line: str, needles: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    good = (corpus / "corpus.jsonl").read_text(encoding="utf-8")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(good + line + "\n", encoding="utf-8")
    out = tmp_path / "out"
    done = cli("data", *tokenize(str(bad), str(out)), cwd=corpus)
    assert_refused(done, "bad.jsonl", *needles)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_misspelt_config_key_names_the_nearest(tmp_path: Path) -> None:
    config = tmp_path / "bad.toml"
    config.write_text('[model]\npreset = "llama-10m"\n[optim]\nlrr = 1e-3\n', encoding="utf-8")
    for verb in ("run", "check"):
        assert_refused(cli("train", verb, config, cwd=tmp_path), "optim.lrr", "optim.lr")
    config.write_text('[model]\npreset = "llama-10m"\n', encoding="utf-8")
    assert_refused(cli("train", "check", config, "shedule.steps=3", cwd=tmp_path), "schedule")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.toml"]


def test_quickstart_config_checks(tmp_path: Path) -> None:
    """``check`` accepts the shipped config once the plan it builds on exists."""
    emitted = tmp_path / "train.toml"
    command = (
        "plan --model llama-10m --gpu cpu --gpus 2 --dtype fp32 --global-batch 16 --seq-len 256"
    )
    done = cli("planner", *command.split(), "--emit", emitted)
    assert done.returncode == 0, done.stderr
    config = ROOT / "configs" / "quickstart.toml"
    done = cli("train", "check", config, f"base={emitted}", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_a_checkpoint_cut_short_is_refused(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    tag = checkpoint / "global_step3"
    tag.mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step3", encoding="utf-8")
    (tag / "mp_rank_00_model_states.pt").write_bytes(b"PK\x03\x04" + bytes(200))
    out = tmp_path / "hf"
    assert_refused(cli("convert", "run", checkpoint, out, "--to", "hf"), "mp_rank_00_model_states")
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
