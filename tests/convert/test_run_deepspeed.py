"""DeepSpeed checkpoints in: every ZeRO stage, masters and model weights, damaged ones refused.

The checkpoints are laid out here by the rules of docs/convert.md; those that DeepSpeed itself wrote
are the ``shared`` tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_checkpoints import Convert, hf_tensors, random_tensors, same, tiny_spec

from fastllm_planner.arch import ArchSpec, iter_params, to_hf_config

Tensors = dict[str, torch.Tensor]


def weights(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def rounded(masters: Tensors) -> Tensors:
    return {n: t.bfloat16() for n, t in masters.items()}


def model_state(
    module: Tensors, groups: list[list[str]], masters: Tensors, world: int
) -> dict[str, Any]:
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{n: masters[n].shape for n in names} for names in groups],
        "shared_params": {},
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "dp_world_size": world,
        "mp_world_size": 1,
        "ds_version": "0.19.8",
    }


def write_zero12(
    root: Path,
    spec: ArchSpec,
    masters: Tensors,
    *,
    stage: int = 1,
    world: int = 2,
    groups: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Partitions of each group's flat buffer, padded to 2 * world."""
    tag = root / "global_step7"
    tag.mkdir(parents=True)
    (root / "latest").write_text("global_step7")
    (root / "config.json").write_text(json.dumps(to_hf_config(spec)))
    names = list(masters)
    split = [
        [n for n in names if masters[n].dim() > 1],
        [n for n in names if masters[n].dim() == 1],
    ]
    lists = split if groups == 2 else [names]
    module = {n: t.to(dtype) for n, t in masters.items()}
    torch.save(model_state(module, lists, masters, world), tag / "mp_rank_00_model_states.pt")
    flats = []
    for held in lists:
        flat = torch.cat([masters[n].reshape(-1) for n in held])
        pad = -flat.numel() % (2 * world)
        flats.append(torch.cat([flat, torch.full((pad,), 7.0)]).chunk(world))
    for rank in range(world):
        state = {
            "zero_stage": stage,
            "partition_count": [world] * len(lists),
            "single_partition_of_fp32_groups": [parts[rank].clone() for parts in flats],
            "base_optimizer_state": {"state": {0: {"exp_avg": flats[0][rank].clone()}}},
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, tag / name)
    return root


def write_zero3(root: Path, spec: ArchSpec, masters: Tensors, *, world: int, sub: int) -> Path:
    """Every parameter cut over the ranks; a rank's slices in sub-groups of ``sub`` elements."""
    tag = root / "global_step7"
    tag.mkdir(parents=True)
    (root / "latest").write_text("global_step7")
    (root / "config.json").write_text(json.dumps(to_hf_config(spec)))
    module = {n: torch.empty(0, dtype=torch.bfloat16) for n in masters}
    ranks: list[list[torch.Tensor]] = [[] for _ in range(world)]
    for tensor in masters.values():
        own = math.ceil(tensor.numel() / world)
        padded = torch.zeros(own * world)
        padded[: tensor.numel()] = tensor.reshape(-1)
        for rank in range(world):
            ranks[rank].append(padded[rank * own : (rank + 1) * own])
    for rank in range(world):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save(model_state(module, [list(masters)], masters, world), tag / name)
        flat = torch.cat(ranks[rank])
        state = {
            "zero_stage": 3,
            "partition_count": world,
            "fp32_flat_groups": list(flat.split(sub)),
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, tag / name)
    return root


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("world", [1, 3, 12])
@pytest.mark.parametrize("groups", [1, 2])
def test_zero_1_and_2(
    tmp_path: Path, convert: Convert, stage: int, world: int, groups: int
) -> None:
    spec = tiny_spec()
    masters = random_tensors(spec)
    source = write_zero12(
        tmp_path / "ds",
        spec,
        masters,
        stage=stage,
        world=world,
        groups=groups,
        dtype=torch.bfloat16,
    )
    convert("run", source, tmp_path / "model", "--to", "hf")
    same(
        weights(tmp_path / "model"),
        rounded(masters),
    )
    convert(
        "run", source / "global_step7", tmp_path / "master", "--to", "hf", "--weights", "master"
    )
    same(weights(tmp_path / "master"), masters)


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("sub", [1000, 10**9])
def test_zero_3(tmp_path: Path, convert: Convert, world: int, sub: int) -> None:
    spec = tiny_spec(vocab=97)
    masters = random_tensors(spec)
    source = write_zero3(tmp_path / "ds", spec, masters, world=world, sub=sub)
    convert("run", source, tmp_path / "master", "--to", "hf", "--weights", "master")
    same(weights(tmp_path / "master"), masters)
    convert("run", source, tmp_path / "model", "--to", "hf")  # rounded to the training type
    same(
        weights(tmp_path / "model"),
        rounded(masters),
    )


def test_tied_embeddings_by_shared_params(tmp_path: Path, convert: Convert) -> None:
    spec = tiny_spec(tied_embeddings=True)
    masters = random_tensors(spec)
    source = write_zero12(
        tmp_path / "ds", spec, masters, stage=2, world=2, groups=1, dtype=torch.float32
    )
    file = source / "global_step7" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=False)
    state["module"]["lm_head.weight"] = state["module"]["model.embed_tokens.weight"]
    state["shared_params"] = {"lm_head.weight": "model.embed_tokens.weight"}
    torch.save(state, file)
    for kind in ("model", "master"):
        out = tmp_path / kind
        convert("run", source, out, "--to", "hf", "--weights", kind)
        same(weights(out), masters)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", ["model", "master"])
def test_tensor_parallel_shards_of_fastllm_train(
    tmp_path: Path, convert: Convert, refused: Callable[..., str], tp: int, kind: str
) -> None:
    """Canonical names, each rank its slice; 2 key/value heads on 4 ranks: neighbours share."""
    spec = tiny_spec()
    masters = random_tensors(spec)
    root = tmp_path / "ds"
    for rank in range(tp):
        held = {}
        for param in iter_params(spec):
            tensor = masters[param.name]
            if param.role in ("attention_k", "attention_v") and tp > spec.kv_heads:
                tensor = tensor.chunk(spec.kv_heads)[rank // (tp // spec.kv_heads)]
            elif param.tp_axis is not None:
                tensor = tensor.chunk(tp, param.tp_axis)[rank]
            held[param.name] = tensor.clone()
        one = write_zero12(tmp_path / f"rank{rank}", spec, held)
        (root / "global_step7").mkdir(parents=True, exist_ok=True)
        for file in (one / "global_step7").iterdir():
            if "model_states" in file.name:
                resave(file, lambda s: s.update(mp_world_size=tp))
            name = file.name.replace("mp_rank_00", f"mp_rank_{rank:02d}")
            file.rename(root / "global_step7" / name)
    (root / "latest").write_text("global_step7")
    (root / "config.json").write_text(json.dumps(to_hf_config(spec)))
    done = convert("run", root, tmp_path / "hf", "--to", "hf", "--weights", kind)
    assert f"tp {tp}" in done.stderr
    same(weights(tmp_path / "hf"), masters if kind == "master" else rounded(masters))
    (root / "global_step7" / f"mp_rank_{tp - 1:02d}_model_states.pt").unlink()
    for file in (root / "global_step7").glob(f"*_mp_rank_{tp - 1:02d}_optim_states.pt"):
        file.unlink()
    message = refused("run", root, tmp_path / "short", "--to", "hf")
    assert f"model-parallel size {tp}" in message


def test_portable_checkpoint_of_fastllm_train(tmp_path: Path, convert: Convert) -> None:
    """``latest`` names a folder of safetensors with canonical names, for GPT-2 too."""
    spec = tiny_spec(
        family="gpt2", kv_heads=4, ffn_hidden=128, mlp="gelu", norm="layernorm",
        position="learned", qkv_bias=True, attention_out_bias=True, mlp_bias=True,
        tied_embeddings=True,
    )  # fmt: skip
    masters = random_tensors(spec)
    tag = tmp_path / "ckpt" / "global_step5"
    tag.mkdir(parents=True)
    names = list(masters)
    weight_map = {}
    for index, held in enumerate((names[:7], names[7:])):
        file = f"model-{index + 1:05d}-of-00002.safetensors"
        save_file({n: masters[n] for n in held}, tag / file)
        weight_map |= dict.fromkeys(held, file)
    (tag / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tag / "config.json").write_text(json.dumps(to_hf_config(spec)))
    (tag.parent / "latest").write_text("global_step5")
    convert("run", tag.parent, tmp_path / "hf", "--to", "hf")
    same(weights(tmp_path / "hf"), hf_tensors(spec, masters))


def sound(tmp_path: Path) -> Path:
    spec = tiny_spec()
    return write_zero12(
        tmp_path / "ds",
        spec,
        random_tensors(spec),
        stage=1,
        world=2,
        groups=1,
        dtype=torch.bfloat16,
    )


def resave(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(file, weights_only=False)
    edit(state)
    torch.save(state, file)


MODEL = "global_step7/mp_rank_00_model_states.pt"
OPTIM = "global_step7/zero_pp_rank_1_mp_rank_00_optim_states.pt"


def _shorten(state: dict[str, Any]) -> None:
    inner = state["optimizer_state_dict"]
    inner["single_partition_of_fp32_groups"] = [
        t[:-100].clone() for t in inner["single_partition_of_fp32_groups"]
    ]


@pytest.mark.parametrize(
    ("edit", "needle"),
    [
        (lambda r: (r / MODEL).unlink(), "mp_rank"),
        (lambda r: (r / OPTIM).unlink(), "2 ranks"),
        (lambda r: (r / OPTIM).write_bytes((r / OPTIM).read_bytes()[:-500]), "rank_1"),
        (lambda r: (r / MODEL).write_bytes((r / MODEL).read_bytes()[:5000]), "mp_rank_00"),
        (lambda r: (r / "config.json").unlink(), "config.json"),
        (lambda r: (r / "config.json").write_text("{}"), "model_type"),
        (lambda r: (r / "latest").write_text("global_step9"), "global_step9"),
        (lambda r: (r / "latest").write_text("../ds"), "latest"),
        (lambda r: resave(r / OPTIM, _shorten), "elements"),
        (lambda r: resave(r / MODEL, lambda s: s["module"].pop("model.norm.weight")), ""),
        (lambda r: resave(r / MODEL, lambda s: s.pop("param_shapes")), "param_shapes"),
    ],
)
def test_damaged_checkpoints_write_nothing(
    tmp_path: Path, refused: Callable[..., str], edit: Callable[[Path], object], needle: str
) -> None:
    source = sound(tmp_path)
    edit(source)
    kind = "model" if needle == "" else "master"
    message = refused("run", source, tmp_path / "hf", "--to", "hf", "--weights", kind)
    assert (needle or "model.norm.weight") in message
    assert {p.name for p in tmp_path.iterdir()} == {"ds"}


def test_a_flipped_bit_is_found(
    tmp_path: Path, convert: Convert, refused: Callable[..., str]
) -> None:
    source = sound(tmp_path)
    data = bytearray((source / MODEL).read_bytes())
    data[len(data) // 2] ^= 1  # the middle of the file is tensor data
    (source / MODEL).write_bytes(data)
    assert "CRC" in refused("run", source, tmp_path / "hf", "--to", "hf")
    assert {p.name for p in tmp_path.iterdir()} == {"ds"}
    convert("run", source, tmp_path / "hf", "--to", "hf", "--no-crc")


CASES = ["ds_zero0_bf16", "ds_zero1_bf16", "ds_zero1_fp32_groups", "ds_zero2_bf16", "ds_zero3_bf16"]


@pytest.mark.shared
@pytest.mark.parametrize("case", CASES)
def test_reference_checkpoints(golden: Path, tmp_path: Path, convert: Convert, case: str) -> None:
    """DeepSpeed 0.19.8's own files: masters as zero_to_fp32 gives them, weights as trained."""
    source = golden / case
    state = next((source / "global_step3").glob("*mp_rank_00_model_states.pt"))
    module = dict(torch.load(state, weights_only=False)["module"])
    convert("run", source, tmp_path / "model", "--to", "hf")
    convert("run", source, tmp_path / "master", "--to", "hf", "--weights", "master")
    model = weights(tmp_path / "model")
    master = weights(tmp_path / "master")
    expected = source / "fp32_zero_to_fp32" / "model.safetensors"
    if expected.is_file():
        same(master, load_file(expected))
    if all(t.numel() for t in module.values()):
        same(model, module)
    dtype = next(iter(module.values())).dtype
    same(model, {n: t.to(dtype) for n, t in master.items()})
