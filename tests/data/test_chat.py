"""Chats: rendered and tokenized as transformers does, masked exactly, packed without loss."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_core import pack_best_fit
from fastllm_data import ChatDataset, IndexedDatasetWriter, UserError
from fastllm_data.__main__ import main
from fastllm_data.chat import weights_of
from fastllm_data.tokenize_chat import ChatOptions, tokenize_chat
from fastllm_data.verify import verify

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' }}{{ message['content'] }}{{ '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
GENERATION = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = "What is the capital of France ? Paris 世界 naïve 12345 def f(x):\n  return x".split(" ")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face tokenizer's folder: byte-level BPE, ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    folder = tmp_path_factory.mktemp("hf")
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator([" ".join(WORDS)] * 50 + ["system user assistant\n"] * 50, trainer)
    hf.enable_truncation(16)  # must not matter
    hf.enable_padding()
    hf.save(str(folder / "tokenizer.json"))
    write_config(folder, CHATML)
    return folder


def write_config(folder: Path, template: str) -> Path:
    folder.mkdir(exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "bos_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chats(count: int, seed: int = 0) -> list[list[dict[str, Any]]]:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 5, 40])))

    found: list[list[dict[str, Any]]] = []
    for _ in range(count):
        chat = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
        for _ in range(rng.randrange(1, 4)):
            chat += [{"role": r, "content": text()} for r in ("user", "assistant")]
        found.append(chat)
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(path: Path, tokenizer: Path, out: Path, **changed: Any) -> list[tuple[Any, Any]]:
    """Ids and weights of each chat."""
    tokenize_chat(ChatOptions((str(path),), tokenizer, out, **changed))
    ds = ChatDataset(out, 100_000, seed=None)
    return [(ds.ids[i].tolist(), ds.mask[i].tolist()) for i in range(len(ds.ids))]


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_ids_are_those_of_transformers(template: str, tokenizer: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_config(tmp_path / "tok", template)
    (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    rows = chats(60)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": chat} for chat in rows])
    made = make(path, folder, tmp_path / "c")
    with_mask = template == GENERATION
    for chat, (ids, weights) in zip(rows, made, strict=True):
        theirs = hf.apply_chat_template(
            chat,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=with_mask,
            truncation=False,
            padding=False,
        )
        assert ids == theirs["input_ids"]
        if with_mask:
            assert weights == theirs["assistant_masks"]


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_only_what_the_assistant_says_is_learnt(
    template: str, tokenizer: Path, tmp_path: Path
) -> None:
    """The learnt tokens decode to the answers with their end, the others to all the rest."""
    from tokenizers import Tokenizer

    hf = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    (tmp_path / "t.jinja").write_text(template)
    rows = chats(80, seed=1)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": chat} for chat in rows])
    made = make(path, tokenizer, tmp_path / "c", template=tmp_path / "t.jinja")
    for chat, (ids, weights) in zip(rows, made, strict=True):
        learnt = [i for i, w in zip(ids, weights, strict=True) if w]
        prompt = [i for i, w in zip(ids, weights, strict=True) if not w]
        said = [m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant"]
        asked = "".join(
            f"<|im_start|>{m['role']}\n"
            + ("" if m["role"] == "assistant" else m["content"] + "<|im_end|>")
            + "\n"
            for m in chat
        )
        assert hf.decode(learnt, skip_special_tokens=False) == "".join(said)
        assert hf.decode(prompt, skip_special_tokens=False) == asked


def test_which_messages_are_learnt(tokenizer: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    hf = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    chat = [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * 2, ["a", "one", "b", "two"], strict=True)
    ]
    weighted = [dict(m, weight=0) if m["content"] == "two" else m for m in chat]
    rows = [
        {"messages": chat},
        {"messages": weighted},
        {"prompt": chat[:3], "completion": chat[3:]},
        {"prompt": "a", "completion": "one"},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", rows)

    def learnt(**changed: Any) -> list[str]:
        made = make(path, tokenizer, tmp_path / "c", force=True, **changed)
        return [
            hf.decode([i for i, w in zip(*one, strict=True) if w], skip_special_tokens=True)
            for one in made
        ]

    assert learnt() == ["onetwo", "one", "two", "one"]
    with pytest.raises(UserError, match=r"x\.jsonl:2: no message of the assistant to learn from"):
        learnt(train_on="last")
    assert learnt(train_on="last", on_error="skip") == ["two", "two", "one"]


def test_templates_that_hide_what_was_said_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    """As those do that drop the thoughts of earlier answers."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}\n{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>one"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "two"},
    ]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": chat}])
    with pytest.raises(UserError, match=r"x\.jsonl:1: message 2: .*with {% generation %}"):
        make(path, tokenizer, tmp_path / "c", template=tmp_path / "t.jinja")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
        ("{{ raise_exception('only two') }}", "refuses it: only two"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses it: Range too big"),
        ("{{ messages[9].content }}", "refuses it: .*has no"),
        ("{% for m in messages %}", "chat template of .*: line 1: Unexpected end of template"),
    ],
)
def test_templates_run_in_a_sandbox(
    template: str, message: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=message):
        make(path, tokenizer, tmp_path / "c", template=tmp_path / "t.jinja")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.jinja", "x.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"text": "x"}', 'neither "messages" nor "prompt" and "completion"'),
        ('{"messages": []}', '"messages" is not a list of messages'),
        ('{"messages": "x"}', '"messages" is not a list of messages'),
        ('{"prompt": 3, "completion": "x"}', '"prompt" is not a text or a list of messages'),
        ('{"messages": [{"role": "boss", "content": "x"}]}', "message 1 has no role of"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no content"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the assistant"),
        ('{"prompt": "\\ud800", "completion": "x"}', "half of a surrogate pair"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "message 1 has no content"),
        ('{"messages": [{"role": "assistant", "content": 7}]}', "neither a text nor a list"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "neither a text nor"),
    ],
)
def test_bad_chats(
    line: str, message: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = json.dumps({"prompt": "a", "completion": "b"})
    path = tmp_path / "x.jsonl"
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    args = ["tokenize-chat", str(path), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "c")]
    assert main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}:3: ")
    assert message in err
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    assert main([*args, "--on-error", "quarantine", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["chats"], result["bad_lines"]) == (2, 1)
    assert (tmp_path / "c.quarantine").read_text() == line + "\n"
    assert message in (tmp_path / "c.errors.txt").read_text()


def test_tokenizers_without_a_template_or_json(
    tokenizer: Path, small_model: Path, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="has no chat template"):
        make(path, tmp_path / "bare", tmp_path / "c")
    with pytest.raises(UserError, match=r"chats need a tokenizer\.json"):
        make(path, small_model, tmp_path / "c")


def test_parquet_chats(tokenizer: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'fastllm-data[parquet]'")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": chat, "source": "x"} for chat in chats(20)]
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert make(tmp_path / "x.parquet", tokenizer, tmp_path / "a") == make(
        tmp_path / "x.jsonl", tokenizer, tmp_path / "b"
    )


# Runs with a checkpoint after every fourth chat, and dies by SIGKILL when it has added so many.
DIES = """
import os, signal, sys
from pathlib import Path
from fastllm_data import chat_files, tokenize_chat as job
left = int(sys.argv[1])
add = chat_files.ChatFiles.add
def counted(self, chat):
    global left
    add(self, chat)
    left -= 1
    if left == 0:
        self._ids.flush()
        os.kill(os.getpid(), signal.SIGKILL)
chat_files.ChatFiles.add = counted
job.BATCH_CHATS, job.CHECKPOINT_SECONDS = 4, 0
source, tokenizer, out = map(Path, sys.argv[2:])
job.tokenize_chat(job.ChatOptions((str(source),), tokenizer, out, on_error="skip", resume=True))
"""


def test_killed_runs_go_on_to_the_same_bytes(tokenizer: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"messages": chat}) for chat in chats(90)]
    for place in (7, 30, 61):
        lines.insert(place, '{"messages": "none"}')
    source = tmp_path / "x.jsonl"
    source.write_text("\n".join(lines) + "\n")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    tokenize_chat(ChatOptions((str(source),), tokenizer, whole, on_error="skip"))
    for adds in (3, 1, 26, 9, 17):  # each goes on from the last checkpoint
        command = [sys.executable, "-c", DIES, str(adds), source, tokenizer, resumed]
        assert subprocess.run(command).returncode == -signal.SIGKILL
        assert not list(tmp_path.glob("resumed_chat*"))
    options = ChatOptions((str(source),), tokenizer, resumed, on_error="skip", resume=True)
    counts = tokenize_chat(options).counts
    assert (counts.chats, counts.bad_lines) == (90, 3)
    endings = ("_chat_document.bin", "_chat_document.idx", "_chat_mask.bin", "_chat_mask.idx")
    for ending in (*endings, ".errors.txt"):
        a, b = (Path(f"{out}{ending}").read_bytes() for out in (whole, resumed))
        assert a == b, ending
    assert verify(Path(f"{resumed}_chat_document")).problems == []
    assert not (tmp_path / "resumed.partial").exists()


def test_a_bad_line_after_a_checkpoint_keeps_what_is_done(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastllm_data.tokenize_chat.BATCH_CHATS", 4)
    monkeypatch.setattr("fastllm_data.tokenize_chat.CHECKPOINT_SECONDS", 0)
    lines = [json.dumps({"messages": chat}) for chat in chats(20)]
    source, out = tmp_path / "x.jsonl", tmp_path / "c"
    source.write_text("\n".join([*lines[:11], "{}", *lines[11:]]) + "\n")
    options = ChatOptions((str(source),), tokenizer, out)
    with pytest.raises(UserError, match=r":12: ") as stopped:
        tokenize_chat(options)
    assert "--resume" in stopped.value.hint
    with pytest.raises(UserError, match="exists"):
        tokenize_chat(options)
    with pytest.raises(UserError, match="other options"):
        tokenize_chat(replace(options, resume=True, train_on="last"))
    summary = tokenize_chat(replace(options, resume=True, on_error="skip"))
    assert (summary.counts.chats, summary.counts.bad_lines) == (20, 1)


def test_files_are_checked(tokenizer: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": chat} for chat in chats(5)])
    make(path, tokenizer, tmp_path / "c")
    for part in ("document", "mask"):
        assert verify(tmp_path / f"c_chat_{part}").ok
    mask = tmp_path / "c_chat_mask.bin"
    content = bytearray(mask.read_bytes())
    content[7] = 2
    mask.write_bytes(content)
    assert "byte 7: id 2 is not" in verify(tmp_path / "c_chat_mask").problems[0]
    with pytest.raises(UserError, match="byte 7: 2 is neither 0 nor 1"):
        ChatDataset(tmp_path / "c", 4096)
    with IndexedDatasetWriter(tmp_path / "c_chat_mask", "uint8") as writer:
        writer.add([0, 1])
        writer.end_document()
    with pytest.raises(UserError, match="its lengths are not those of"):
        ChatDataset(tmp_path / "c", 4096)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_weights_against_the_definition(data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, 60), max_size=8)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    edges = sorted(data.draw(st.lists(st.integers(0, 60), max_size=30)))
    offsets = list(pairwise(edges))
    weights, partly = weights_of(offsets, spans)
    held = [
        [any(s <= c < e for s, e in spans) for c in range(begin, end)] for begin, end in offsets
    ]
    # Two spans that touch are two answers, and no token may run over both.
    whole = [any(s <= b and e <= t for s, t in spans) and b < e for b, e in offsets]
    assert weights.tolist() == [int(w) for w in whole]
    assert all(all(h) for h, w in zip(held, whole, strict=True) if w)
    assert partly == sum(any(h) and not w for h, w in zip(held, whole, strict=True))


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """The packing by its definition, in quadratic time."""
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space, when the pack came to it) of each pack
    time = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[item] == 0:
            continue
        fits = [p for p in range(len(packs)) if spaces[p][0] >= lengths[item]]
        time += 1
        if fits:
            pack = min(fits, key=lambda p: (spaces[p][0], -spaces[p][1]))
        else:
            pack = len(packs)
            packs.append([])
            spaces.append((capacity, time))
        packs[pack].append(item)
        spaces[pack] = (spaces[pack][0] - lengths[item], time)
    return packs


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c)))))
def test_packing_against_its_definition(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    items, ends = pack_best_fit(np.array(lengths, dtype=np.int32), capacity)
    packs = [items[b:e].tolist() for b, e in pairwise([0, *ends.tolist()])]
    assert packs == best_fit(lengths, capacity)


@pytest.mark.parametrize("seq_len", [40, 200, 4096])
@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_packing_loses_nothing(
    overlong: str, seq_len: int, tokenizer: Path, tmp_path: Path
) -> None:
    """Every (input, label, weight, position) of every chat is in an epoch once, between borders."""
    rows = [{"messages": chat} for chat in chats(150, seed=2)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    tokenize_chat(ChatOptions((str(path),), tokenizer, tmp_path / "c"))
    ds = ChatDataset(tmp_path / "c", seq_len, overlong=overlong, seed=7)
    expected: list[tuple[tuple[int, int, int, int], ...]] = []
    for i in range(len(ds.ids)):
        ids, weights = ds.ids[i].tolist(), ds.mask[i].tolist()
        if len(ids) - 1 > seq_len:
            if overlong == "drop":
                continue
            ids, weights = ids[: seq_len + 1], weights[: seq_len + 1]
        rows_of = zip(ids, ids[1:], weights[1:], range(len(ids)), strict=False)
        expected.append(tuple(rows_of))
    for epoch in range(2):
        seen: list[tuple[tuple[int, int, int, int], ...]] = []
        for i in range(epoch * len(ds), (epoch + 1) * len(ds)):
            sample = ds[i]
            borders = sample["cu_seqlens"].tolist()
            assert borders[0] == 0
            assert borders[-1] == seq_len
            columns = [
                sample[k].tolist() for k in ("tokens", "labels", "loss_mask", "position_ids")
            ]
            cells = list(zip(*columns, strict=True))
            parts = [tuple(cells[b:e]) for b, e in pairwise(borders)]
            if len(parts) > len(ds.chats_of(int(ds._order[i % len(ds)]))):  # the last is padding
                assert {row[2] for row in parts.pop()} == {0.0}
            seen.extend(parts)
        assert sorted(seen) == sorted(expected)
    assert ds.padding_share < 0.2 or seq_len == 4096
    again = ChatDataset(tmp_path / "c", seq_len, overlong=overlong, seed=7)
    for key, value in again[len(ds) + 1].items():  # any sample first, in O(1)
        assert np.array_equal(value, ds[len(ds) + 1][key])  # type: ignore[literal-required]


def test_overlong_chats_are_an_error_unless_said_otherwise(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "word " * 100}, {"prompt": "a", "completion": "b"}]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    tokenize_chat(ChatOptions((str(path),), tokenizer, tmp_path / "c"))
    with pytest.raises(UserError, match="1 chats have more than 21 tokens"):
        ChatDataset(tmp_path / "c", 20)
    assert ChatDataset(tmp_path / "c", 20, overlong="drop").overlong == 1


def test_a_token_over_the_border_is_not_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a template that ends the prompt in the middle of a word."""
    from tokenizers import Tokenizer, models

    hf = Tokenizer(models.BPE({"A": 0, ":": 1, "x": 2, "y": 3, ":x": 4}, [(":", "x")]))
    hf.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "A:", "completion": "xyx"}])
    ((ids, weights),) = make(path, tmp_path, tmp_path / "c")
    assert ids == [0, 4, 3, 2]
    assert weights == [0, 0, 1, 1]
    assert "1 tokens hold text of a prompt and of an answer" in capsys.readouterr().err
