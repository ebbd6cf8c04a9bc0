"""Meta, Megatron, Megatron-DeepSpeed, DeepSpeed: any to any, any parallel size, bit for bit."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sample_checkpoints import (
    Convert,
    Tensors,
    random_tensors,
    same,
    tiny_spec,
    write_hf,
)

from fastllm_convert.files.torch_zip import check_crc, read_torch
from fastllm_convert.formats import megatron_names, meta
from fastllm_convert.layouts import Row
from fastllm_planner.arch import ArchSpec, MoeSpec, RopeSpec, iter_params

LLAMA = tiny_spec(layers=4, heads=8, kv_heads=4, head_dim=4, vocab=97)
EVEN = tiny_spec(layers=4, heads=8, kv_heads=4, head_dim=4)  # Meta's format does not pad
GPT2 = tiny_spec(
    family="gpt2", layers=4, kv_heads=4, ffn_hidden=128, mlp="gelu", norm="layernorm",
    position="learned", qkv_bias=True, attention_out_bias=True, mlp_bias=True,
    tied_embeddings=True,
)  # fmt: skip
QWEN3 = tiny_spec(family="qwen3", layers=4, kv_heads=4, qk_norm=True, tied_embeddings=True)
MIXTRAL = tiny_spec(family="mixtral", moe=MoeSpec(4, 2, 48))
SPECS = {"llama": LLAMA, "gpt2": GPT2, "qwen3": QWEN3, "mixtral": MIXTRAL}


def source(tmp_path: Path, spec: ArchSpec, dtype: torch.dtype = torch.bfloat16) -> Path:
    return write_hf(tmp_path / "src", spec, random_tensors(spec, dtype))


def weights(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def megatron_file(folder: Path, rank: int, stage: int | None = None) -> dict:
    name = f"mp_rank_{rank:02d}" + ("" if stage is None else f"_{stage:03d}")
    path = folder / "iter_0000001" / name / "model_optim_rng.pt"
    check_crc(path, read_torch(path).members)
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("layout", ["core", "core-te", "legacy"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_megatron_and_back(
    tmp_path: Path, convert: Convert, family: str, tp: int, pp: int, layout: str
) -> None:
    spec = SPECS[family]
    src = source(tmp_path, spec)
    size = ["--tp", str(tp), "--pp", str(pp), "--megatron-layout", layout]
    convert("run", src, tmp_path / "mg", "--to", "megatron", "--vocab-pad", "8", *size)
    found = convert("run", tmp_path / "mg", tmp_path / "hf", "--to", "hf")
    assert f"tp {tp}, pp {pp}" in found.stderr
    same(weights(tmp_path / "hf"), weights(src))
    assert len(list((tmp_path / "mg").glob("iter_*/*/model_optim_rng.pt"))) == tp * pp


def test_resharding_is_a_bijection(tmp_path: Path, convert: Convert) -> None:
    """TP 1 → 2 → 4 → 1 and PP 1 → 4 → 2 → 1, straight from Megatron to Megatron."""
    src = source(tmp_path, LLAMA)
    convert("run", src, tmp_path / "a", "--to", "megatron")
    for step, (a, b, tp, pp) in enumerate([("a", "b", 2, 4), ("b", "c", 4, 2), ("c", "d", 1, 1)]):
        size = ("--tp", str(tp), "--pp", str(pp))
        convert("run", tmp_path / a, tmp_path / b, "--to", "megatron", *size)
        assert step >= 0
    first, last = (megatron_file(tmp_path / x, 0)["model"] for x in ("a", "d"))
    same(tensors_of(first), tensors_of(last))


def tensors_of(model: dict) -> Tensors:
    return {k: v for k, v in model.items() if isinstance(v, torch.Tensor)}


def test_virtual_stages_hold_the_right_layers(tmp_path: Path, convert: Convert) -> None:
    """Interleaving: chunk v of stage p holds layers v*(L/vp) + p*(L/pp/vp) and on."""
    src = source(tmp_path, LLAMA)
    args = ("--to", "megatron", "--pp", "2", "--vp", "2")
    convert("run", src, tmp_path / "mg", *args)
    original = weights(src)
    for stage, chunk, layer in [(0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 3)]:
        model = megatron_file(tmp_path / "mg", 0, stage)[f"model{chunk}"]
        found = model["decoder.layers.0.input_layernorm.weight"]
        assert torch.equal(found, original[f"model.layers.{layer}.input_layernorm.weight"])
    convert("run", tmp_path / "mg", tmp_path / "hf", "--to", "hf")
    same(weights(tmp_path / "hf"), original)


def test_megatron_rows_by_hand(tmp_path: Path, convert: Convert) -> None:
    """Fused q, k, v per group, gate and up per rank, padded vocabulary: against plain torch."""
    src = source(tmp_path, LLAMA)
    convert("run", src, tmp_path / "mg", "--to", "megatron", "--tp", "2", "--vocab-pad", "16")
    original = weights(src)
    prefix = "model.layers.1."
    q, k, v = (original[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv")
    d, per = LLAMA.head_dim, LLAMA.heads // LLAMA.kv_heads
    groups = zip(q.split(per * d), k.split(d), v.split(d), strict=True)
    rows = [torch.cat(parts) for parts in groups]
    gate, up = (original[f"{prefix}mlp.{x}_proj.weight"] for x in ("gate", "up"))
    for rank in range(2):
        model = megatron_file(tmp_path / "mg", rank)["model"]
        fused = model["decoder.layers.1.self_attention.linear_qkv.weight"]
        assert torch.equal(fused, torch.cat(rows[rank * 2 : rank * 2 + 2]))
        half = LLAMA.ffn_hidden // 2
        cut = slice(rank * half, (rank + 1) * half)
        fc1 = model["decoder.layers.1.mlp.linear_fc1.weight"]
        assert torch.equal(fc1, torch.cat([gate[cut], up[cut]]))
        down = original[f"{prefix}mlp.down_proj.weight"][:, cut]
        assert torch.equal(model["decoder.layers.1.mlp.linear_fc2.weight"], down)
    embedding = original["model.embed_tokens.weight"]
    last = megatron_file(tmp_path / "mg", 1)["model"]["embedding.word_embeddings.weight"]
    assert last.shape[0] == 64  # 97 → 128 = 16 * 2 * 4, half of it per rank
    assert torch.equal(last[:33], embedding[64:])
    assert torch.equal(last[33:], embedding[96:].expand(31, -1))
    args = megatron_file(tmp_path / "mg", 0)["args"]
    assert (args.vocab_size, args.padded_vocab_size) == (97, 128)
    assert (args.rotary_base, args.norm_epsilon) == (10000, 1e-5)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_meta_and_back(tmp_path: Path, convert: Convert, shards: int, theta: float) -> None:
    from dataclasses import replace

    spec = replace(LLAMA, vocab=96, rope=RopeSpec(theta))
    src = source(tmp_path, spec, torch.float16)
    convert("run", src, tmp_path / "meta", "--to", "meta", "--tp", str(shards))
    files = sorted((tmp_path / "meta").glob("consolidated.*.pth"))
    assert len(files) == shards
    first = torch.load(files[0])
    split = (96, 32 // shards) if theta == 1e4 else (96 // shards, 32)
    assert first["tok_embeddings.weight"].shape == split
    (tmp_path / "meta" / "config.json").unlink()  # as Meta ships it: params.json alone
    convert("run", tmp_path / "meta", tmp_path / "hf", "--to", "hf")
    same(weights(tmp_path / "hf"), weights(src))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == theta
    assert config["max_position_embeddings"] == (4096 if theta == 1e4 else 8192)


def test_rotary_rows_by_hand(tmp_path: Path, convert: Convert) -> None:
    """The permutation of transformers' convert_llama_weights_to_hf, inverted."""
    src = source(tmp_path, LLAMA)
    convert("run", src, tmp_path / "meta", "--to", "meta")
    held = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    for name, heads in (("wq", LLAMA.heads), ("wk", LLAMA.kv_heads)):
        theirs = weights(src)[f"model.layers.2.self_attn.{name[1]}_proj.weight"]
        rows, columns = theirs.shape
        expected = (
            theirs.view(heads, 2, rows // heads // 2, columns)
            .transpose(1, 2)
            .reshape(rows, columns)
        )
        assert torch.equal(held[f"layers.2.attention.{name}.weight"], expected)


@pytest.mark.parametrize("qkv", ["interleaved", "concat"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (4, 1)])
def test_megatron_deepspeed_and_back(
    tmp_path: Path, convert: Convert, tp: int, pp: int, qkv: str
) -> None:
    src = source(tmp_path, LLAMA)
    size = ("--tp", str(tp), "--pp", str(pp), "--target-qkv-layout", qkv)
    convert("run", src, tmp_path / "ds", "--to", "megatron-deepspeed", *size)
    convert("run", tmp_path / "ds", tmp_path / "hf", "--to", "hf")
    same(weights(tmp_path / "hf"), weights(src))


def test_ambiguous_qkv_order_is_refused(
    tmp_path: Path, convert: Convert, refused: Callable[..., str]
) -> None:
    src = source(tmp_path, LLAMA)
    convert("run", src, tmp_path / "ds", "--to", "megatron-deepspeed", "--tp", "2")
    for file in (tmp_path / "ds" / "global_step0").glob("mp_rank_*"):
        file.unlink()
    assert "--qkv-layout" in refused("run", tmp_path / "ds", tmp_path / "hf", "--to", "hf")
    args = ("--to", "hf", "--qkv-layout", "interleaved")
    convert("run", tmp_path / "ds", tmp_path / "hf", *args)
    same(weights(tmp_path / "hf"), weights(src))


def test_the_long_round_trip(tmp_path: Path, convert: Convert) -> None:
    """Meta → HF → Megatron (TP 2, PP 2) → HF → Meta, and through DeepSpeed: identical files."""
    src = source(tmp_path, EVEN)
    convert("run", src, tmp_path / "meta", "--to", "meta", "--tp", "2")
    chain = [
        ("meta", "hf1", ["hf"]),
        ("hf1", "mg", ["megatron", "--tp", "2", "--pp", "2"]),
        ("mg", "hf2", ["hf"]),
        ("hf2", "ds", ["deepspeed"]),
        ("ds", "mds", ["megatron-deepspeed", "--tp", "2"]),
        ("mds", "meta2", ["meta", "--tp", "2"]),
    ]
    for a, b, to in chain:
        convert("run", tmp_path / a, tmp_path / b, "--to", *to)
    for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json", "config.json"):
        assert (tmp_path / "meta" / name).read_bytes() == (tmp_path / "meta2" / name).read_bytes()
    assert convert("verify", tmp_path / "meta", tmp_path / "ds").stdout.startswith("equal")


def test_deepspeed_target_has_the_models_own_names(tmp_path: Path, convert: Convert) -> None:
    src = source(tmp_path, QWEN3)
    convert("run", src, tmp_path / "ds", "--to", "deepspeed")
    state = torch.load(
        tmp_path / "ds" / "global_step0" / "mp_rank_00_model_states.pt", weights_only=False
    )
    names = [p.name for p in iter_params(QWEN3)]
    assert list(state["module"]) == names
    tied = state["module"]["lm_head.weight"]
    assert tied.data_ptr() == state["module"]["model.embed_tokens.weight"].data_ptr()
    assert state["shared_params"] == {"lm_head.weight": "model.embed_tokens.weight"}


TABLES: list[tuple[str, Callable[[ArchSpec], list[Row]], ArchSpec]] = [
    ("meta", meta.name_table, LLAMA),
    *[
        (f"{name}-{family}", lambda s, d=dialect: megatron_names.name_table(s, d), SPECS[family])
        for name, dialect in megatron_names.DIALECTS.items()
        for family in ("llama", "gpt2", "qwen3")
    ],
    *[
        (f"{name}-mixtral", lambda s, d=dialect: megatron_names.name_table(s, d), MIXTRAL)
        for name, dialect in megatron_names.DIALECTS.items()
    ],
]


@pytest.mark.parametrize(("table", "spec"), [t[1:] for t in TABLES], ids=[t[0] for t in TABLES])
def test_tables_are_bijections(table: Callable[[ArchSpec], list[Row]], spec: ArchSpec) -> None:
    rows = table(spec)
    held = sorted(n for row in rows for n in row.canonical)
    assert held == sorted(p.name for p in iter_params(spec) if p.tied_to is None)
    assert len({r.name for r in rows}) == len(rows)


@pytest.mark.parametrize(
    ("to", "needle"),
    [
        (["megatron", "--tp", "3"], "use 1, 2, 4"),
        (["megatron", "--pp", "3"], "pp=3"),
        (["megatron", "--vp", "2"], "--vp"),
        (["meta", "--pp", "2"], "pipeline"),
        (["hf", "--tp", "2"], "one file"),
        (["megatron-deepspeed", "--tp", "16"], "tp=16"),
        (["hf", "--dtype", "int8"], "int8"),
        (["hf", "--shard-size", "big"], "size"),
    ],
)
def test_wrong_sizes_are_refused(
    tmp_path: Path, refused: Callable[..., str], to: list[str], needle: str
) -> None:
    src = source(tmp_path, LLAMA)
    assert needle in refused("run", src, tmp_path / "out", "--to", *to)
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_what_meta_cannot_say_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    src = source(tmp_path, QWEN3)
    assert "norms on q and k" in refused("run", src, tmp_path / "out", "--to", "meta")


@pytest.mark.parametrize(
    ("edit", "needle"),
    [
        (lambda r: remove(r, "mp_rank_01_000"), "is missing"),
        (lambda r: remove(r, "mp_rank_01_*"), "tensor_model_parallel_size"),
        (lambda r: cut(r, "mp_rank_00_001"), "zip directory"),
        (
            lambda r: edit_model(r, lambda m: m.pop(FC1)),
            "missing",
        ),
        (lambda r: edit_model(r, lambda m: m.update(extra=torch.zeros(1))), "unexpected"),
        (lambda r: halve(r), "shape"),
        (lambda r: unequal(r), "differ"),
        (lambda r: (r / "latest_checkpointed_iteration.txt").write_text("7"), "iter_0000007"),
        (lambda r: (r / "latest_checkpointed_iteration.txt").write_text("../x"), "neither"),
    ],
)
def test_damaged_megatron_checkpoints(
    tmp_path: Path,
    convert: Convert,
    refused: Callable[..., str],
    edit: Callable[[Path], object],
    needle: str,
) -> None:
    src = source(tmp_path, LLAMA)
    root = tmp_path / "mg"
    convert("run", src, root, "--to", "megatron", "--tp", "2", "--pp", "2")
    edit(root)
    assert needle in refused("run", root, tmp_path / "out", "--to", "hf")
    assert {p.name for p in tmp_path.iterdir()} == {"src", "mg"}


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


def remove(root: Path, pattern: str) -> None:
    for folder in (root / "iter_0000001").glob(pattern):
        (folder / "model_optim_rng.pt").unlink()
        folder.rmdir()


def cut(root: Path, name: str) -> None:
    file = root / "iter_0000001" / name / "model_optim_rng.pt"
    file.write_bytes(file.read_bytes()[:-40])


def edit_model(root: Path, edit: Callable[[dict], object]) -> None:
    file = root / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    edit(state["model"])
    torch.save(state, file)


def halve(root: Path) -> None:
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    edit_model(root, lambda m: m.update({name: m[name][:-4].clone()}))


def unequal(root: Path) -> None:
    name = "decoder.layers.0.input_layernorm.weight"
    edit_model(root, lambda m: m.update({name: m[name] + 1}))


def test_a_missing_meta_shard(
    tmp_path: Path, convert: Convert, refused: Callable[..., str]
) -> None:
    src = source(tmp_path, EVEN)
    convert("run", src, tmp_path / "meta", "--to", "meta", "--tp", "4")
    (tmp_path / "meta" / "consolidated.02.pth").unlink()
    message = refused("run", tmp_path / "meta", tmp_path / "out", "--to", "hf")
    assert "consolidated.02.pth is missing" in message
    (tmp_path / "meta" / "consolidated.03.pth").unlink()  # two of four: no longer seen by counting
    refused("run", tmp_path / "meta", tmp_path / "out", "--to", "hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("alias", "to"),
    [
        ("meta-to-hf --input-dir {meta} --output-dir {out} --model-size 7B", "hf"),
        (
            "hf-to-megatron --load-dir {src} --save-dir {out} --target-tensor-parallel-size 2",
            "megatron",
        ),
        (
            "deepspeed-to-megatron --input_folder {ds} --output_folder {out} "
            "--target_tp 2 --target_pp 2",
            "megatron",
        ),
        ("deepspeed-to-hf --input-folder {ds} --output-folder {out}", "hf"),
    ],
)
def test_aliases(tmp_path: Path, convert: Convert, alias: str, to: str) -> None:
    src = source(tmp_path, LLAMA)
    convert("run", src, tmp_path / "meta", "--to", "meta")
    convert("run", src, tmp_path / "ds", "--to", "megatron-deepspeed", "--tp", "4")
    names = {n: tmp_path / n for n in ("src", "meta", "ds", "out")}
    convert(*[part.format(**names) for part in alias.split()])
    found = json.loads(convert("inspect", tmp_path / "out", "--json").stdout)
    assert found["format"] == to
    assert convert("verify", src, tmp_path / "out").stdout.startswith("equal")


def test_tokenizer_model_from_elsewhere(
    tmp_path: Path, convert: Convert, refused: Callable[..., str]
) -> None:
    src = source(tmp_path, LLAMA)
    given = tmp_path / "my-tokenizer.model"
    given.write_bytes(b"neither SentencePiece nor ranks")
    command = ("hf-to-megatron", "--load-dir", src, "--tokenizer-model", given)
    convert(*command, "--save-dir", tmp_path / "mg")
    assert (tmp_path / "mg" / "tokenizer.model").read_bytes() == given.read_bytes()
    given.unlink()
    assert "does not exist" in refused(*command, "--save-dir", tmp_path / "out")


def test_torch_distributed_checkpoint_by_torch_itself(tmp_path: Path, convert: Convert) -> None:
    """A layout-free checkpoint with canonical names, written by torch.distributed.checkpoint."""
    src = source(tmp_path, LLAMA)
    for prefix in ("", "model"):
        held: dict = dict(random_tensors(LLAMA, torch.bfloat16))
        state = {prefix: held, "optimizer": {"step": torch.ones(1)}} if prefix else held
        folder = tmp_path / f"dcp{prefix}"
        save = importlib.import_module("torch.distributed.checkpoint").save
        with warnings.catch_warnings():  # one process, which is what no_dist asks for
            warnings.simplefilter("ignore", UserWarning)
            save(state, checkpoint_id=folder, no_dist=True)
        (folder / "config.json").write_text((src / "config.json").read_text())
        convert("run", folder, tmp_path / f"hf{prefix}", "--to", "hf")
        same(weights(tmp_path / f"hf{prefix}"), weights(src))
    chunk = next((tmp_path / "dcp").glob("*.distcp"))
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    convert("run", tmp_path / "dcp", tmp_path / "cut", "--to", "hf", status=2)
    assert not (tmp_path / "cut").exists()
