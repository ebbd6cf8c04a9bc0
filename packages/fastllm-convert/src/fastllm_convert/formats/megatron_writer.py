"""The Megatron-LM folder to write: ``iter_0000001/mp_rank_TT[_PPP]/model_optim_rng.pt``.

Any tensor- and pipeline-parallel size, virtual stages included. The vocabulary is padded to a
multiple of ``vocab_multiple * tp`` as Megatron does, with copies of the last row as its tools do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastllm_convert.checkpoint import Checkpoint
from fastllm_convert.dtypes import DType
from fastllm_convert.engine.plan import Plan, literal_file, sources_of
from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_pickle_writer import Namespace, Tensor
from fastllm_convert.files.torch_writer import torch_file
from fastllm_convert.formats.companions import companion_files, target_type
from fastllm_convert.formats.megatron_args import args_of
from fastllm_convert.formats.megatron_names import (
    Dialect,
    check_family,
    chunk_rows,
    embedding_rows,
    expert_ranges,
)
from fastllm_convert.layouts import Row
from fastllm_convert.sharding import (
    check_tp,
    is_vocabulary,
    layer_ranges,
    pad_vocab,
    padded_vocab,
    part,
)
from fastllm_planner.arch import ParamSpec, iter_params


@dataclass(frozen=True)
class Parallel:
    """Target layout. ``vp``: virtual stages per pipeline stage; ``ep``: expert-parallel ranks."""

    tp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    vocab_multiple: int = 128


class RankTensors:
    """Makes one rank's tensors from rows: canonical → padded → its slice → fused.

    ``expert_tp`` 1: experts stay whole on every rank.
    """

    def __init__(
        self,
        source: Checkpoint,
        parallel: Parallel,
        dtype: DType | None,
        *,
        expert_tp: int | None = None,
    ) -> None:
        self.source, self.parallel, self.dtype = source, parallel, dtype
        self.expert_tp = parallel.tp if expert_tp is None else expert_tp
        self.params: dict[str, ParamSpec] = {p.name: p for p in iter_params(source.spec)}
        size = padded_vocab(source.spec.vocab, parallel.vocab_multiple, parallel.tp)
        self.padded_vocab = size

    def tensor(self, row: Row, rank: int) -> Tensor:
        parts = [self._part(name, rank) for name in row.canonical]
        array = row.how.join(parts)
        return Tensor(array, target_type(array, self.dtype))

    def _part(self, name: str, rank: int) -> Any:
        param = self.params[name]
        array = self.source.tensors[name]
        if is_vocabulary(param):
            array = pad_vocab(array, self.padded_vocab)
        if param.expert is not None and self.expert_tp == 1:
            return array
        return part(array, param.tp_axis, self.parallel.tp, rank)


def plan(source: Checkpoint, *, parallel: Parallel, dialect: Dialect, dtype: DType | None) -> Plan:
    """Raises ``UserError`` when a size does not divide, naming it."""
    spec = source.spec
    check_family(spec)
    check_tp(spec, parallel.tp)
    if parallel.vp > 1 and parallel.pp == 1:
        raise UserError("--vp needs --pp of at least 2")
    stages = layer_ranges(spec.layers, parallel.pp, parallel.vp)
    experts = expert_ranges(spec, parallel.ep)
    tensors = RankTensors(source, parallel, dtype)
    carried = companion_files(source, dtype)
    args = args_of(
        spec,
        tp=parallel.tp,
        pp=parallel.pp,
        vp=parallel.vp,
        ep=parallel.ep,
        vocab_multiple=parallel.vocab_multiple,
        dtype=dtype or source.dtype,
        tokenizer=tokenizer_type(carried.files),
        legacy=dialect.name == "legacy",
    )
    files = [
        torch_file(
            f"iter_0000001/{rank_folder(rank, stage, expert_rank, parallel)}/model_optim_rng.pt",
            _rank_file(tensors, chunks, stage, rank, held, dialect, args),
        )
        for stage, chunks in enumerate(stages)
        for rank in range(parallel.tp)
        for expert_rank, held in enumerate(experts)
    ]
    files.append(literal_file("latest_checkpointed_iteration.txt", b"1"))
    files += [literal_file(name, content) for name, content in sorted(carried.files.items())]
    notes = [*source.notes, *carried.notes]
    if spec.norm_head:
        notes.append(
            "the head is stored raw; this model divides its rows by their length at run time, "
            "Megatron does not"
        )
    if spec.position == "alibi":
        notes.append("this model has ALiBi positions; Megatron-LM has none")
    return Plan(
        files=files,
        sources=sources_of(list(source.tensors.values())),
        checked=source.checked,
        equal=source.equal,
        notes=notes,
    )


def tokenizer_type(files: Mapping[str, bytes]) -> str:
    """Megatron's name for the tokenizer that travels along."""
    if files.get("tokenizer.model", b"")[:1] == b"\n":  # SentencePiece
        return "Llama2Tokenizer"
    return "GPT2BPETokenizer" if "merges.txt" in files else "HuggingFaceTokenizer"


def rank_folder(rank: int, stage: int, expert_rank: int, parallel: Parallel) -> str:
    """``mp_rank_TT``, with ``_PPP`` and ``_EEE`` where there is more than one of them."""
    name = f"mp_rank_{rank:02d}"
    name += f"_{stage:03d}" if parallel.pp > 1 else ""
    return name + (f"_{expert_rank:03d}" if parallel.ep > 1 else "")


def _rank_file(
    tensors: RankTensors,
    chunks: list[range],
    stage: int,
    rank: int,
    experts: range | None,
    dialect: Dialect,
    args: Mapping[str, Any],
) -> dict[str, Any]:
    """The pickled object of one (tensor, pipeline) rank."""
    last = stage == tensors.parallel.pp - 1
    found: dict[str, Any] = {
        "args": Namespace(args),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "num_floating_point_operations_so_far": 0,
    }
    for index, layers in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{index}"
        first_chunk = stage == 0 and index == 0
        last_chunk = last and index == len(chunks) - 1
        flat = _chunk(tensors, layers, rank, experts, dialect, first=first_chunk, last=last_chunk)
        found[key] = nested(flat) if dialect.name == "legacy" else flat
    return found


def _chunk(
    tensors: RankTensors,
    layers: range,
    rank: int,
    experts: range | None,
    dialect: Dialect,
    *,
    first: bool,
    last: bool,
) -> dict[str, Any]:
    spec = tensors.source.spec
    rows = chunk_rows(
        spec, layers, dialect, tp=tensors.parallel.tp, first=first, last=last, experts=experts
    )
    if last and spec.tied_embeddings and not first:
        # A stage without the embedding keeps its own copy, all-reduced in training.
        rows.append(embedding_rows(spec, dialect)[0]._replace(name=tied_head_name(dialect)))
    flat: dict[str, Any] = {row.name: tensors.tensor(row, rank) for row in rows}
    return with_extra_state(flat, dialect)


def tied_head_name(dialect: Dialect) -> str:
    return "word_embeddings_for_head.weight" if dialect.name == "legacy" else dialect.head


def with_extra_state(flat: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """Megatron's linear layers have a ``_extra_state`` entry (None), which strict loading wants."""
    linear = {m.rpartition(".")[2] for m in (dialect.qkv, dialect.dense, dialect.fc1, dialect.fc2)}
    found: dict[str, Any] = {}
    for name, value in flat.items():
        found[name] = value
        module = name.rpartition(".")[0]
        if module.rpartition(".")[2] in {*linear, "output_layer"}:  # those of experts too
            found[f"{module}._extra_state"] = None
        if dialect.name == "core-te" and module.endswith("linear_proj"):
            attention = module.rpartition(".")[0]
            found[f"{attention}.core_attention._extra_state"] = None
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The legacy model's nesting: language_model / {embedding, encoder, output_layer}."""
    model: dict[str, Any] = {}
    for name, value in flat.items():
        top, _, rest = name.partition(".")
        if top == "word_embeddings_for_head":
            return_to = model.setdefault(top, {})
            return_to[rest] = value
            continue
        language = model.setdefault("language_model", {})
        if top == "embedding":
            module, _, leaf = rest.rpartition(".")
            language.setdefault("embedding", {}).setdefault(module, {})[leaf] = value
        else:
            language.setdefault(top, {})[rest] = value
    return model
