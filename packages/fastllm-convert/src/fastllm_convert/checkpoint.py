"""A checkpoint between source and target: canonical tensors and what goes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastllm_convert.arrays import Array, SourceFile
from fastllm_convert.dtypes import DType
from fastllm_convert.errors import UserError
from fastllm_convert.layouts import Row, to_canonical
from fastllm_planner.arch import ArchError, ArchSpec, ParamSpec, iter_params

if TYPE_CHECKING:
    from fastllm_convert.files.torch_zip import Member, TorchFile

T = TypeVar("T")


@dataclass(frozen=True)
class Companions:
    """What travels with the weights. ``folder`` holds tokenizer files; configs are parsed JSON.

    ``tokenizer_model``: a ``tokenizer.model`` from elsewhere, instead of the folder's.
    """

    folder: Path | None = None
    tokenizer_model: Path | None = None
    hf_config: Mapping[str, Any] | None = None
    generation_config: Mapping[str, Any] | None = None
    add_bos: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` are complete, canonical, and checked against ``spec``; nothing is read yet.

    ``checked`` lists the zip members whose CRC-32 must hold, ``equal`` what must be identical.
    ``rounded``: the type that the weights were used in, where only wider masters are stored.
    """

    format: str
    summary: str
    spec: ArchSpec
    tensors: Mapping[str, Array]
    companions: Companions = field(default_factory=Companions)
    checked: Sequence[tuple[SourceFile, Member]] = ()
    equal: Sequence[tuple[str, Array, Array]] = ()
    rounded: DType | None = None
    notes: Sequence[str] = ()

    @property
    def dtype(self) -> DType:
        """The type most elements have."""
        count: dict[DType, int] = {}
        for array in self.tensors.values():
            count[array.dtype] = count.get(array.dtype, 0) + array.numel
        return max(count, key=lambda d: count[d])


def members_of(files: Sequence[TorchFile]) -> list[tuple[SourceFile, Member]]:
    """Every zip member of some torch files, for the CRC check."""
    return [(f.file, m) for f in files for m in f.members.values() if m.size]


def name_list(names: Sequence[str], limit: int = 3) -> str:
    """``'a', 'b', 'c' and 7 more``."""
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_names(
    found: Mapping[str, Array],
    expected: Sequence[str],
    where: str,
    *,
    optional: frozenset[str] = frozenset(),
) -> None:
    """Every expected tensor is there and nothing else. One ``UserError`` otherwise."""
    missing = [n for n in expected if n not in found and n not in optional]
    known = set(expected) | optional
    extra = [n for n in found if n not in known]
    if missing:
        raise UserError(f"{where}: missing tensor{'s' * (len(missing) > 1)} {name_list(missing)}")
    if extra:
        raise UserError(
            f"{where}: unexpected tensor{'s' * (len(extra) > 1)} {name_list(extra)}",
            hint="the config describes another model, or the family is not the one detected",
        )


def from_rows(
    rows: Sequence[Row],
    tensors: Mapping[str, Array],
    where: str,
    *,
    optional: frozenset[str] = frozenset(),
) -> dict[str, Array]:
    """Check a format's names against its table and take them to canonical tensors."""
    check_names(tensors, [r.name for r in rows], where, optional=optional)
    present = [r for r in rows if r.name in tensors]
    try:
        return to_canonical(present, tensors)
    except ValueError as error:
        raise UserError(f"{where}: tensor {error}") from None


def check_shapes(
    spec: ArchSpec, tensors: Mapping[str, Array], where: str
) -> tuple[dict[str, Array], list[tuple[str, Array, Array]]]:
    """Canonical tensors must be exactly those of ``iter_params``, shapes included.

    A tied head is dropped when present; the second result says what it must be equal to.
    """
    kept: dict[str, Array] = {}
    equal: list[tuple[str, Array, Array]] = []
    check_names(
        tensors,
        [p.name for p in iter_params(spec) if p.tied_to is None],
        where,
        optional=frozenset(p.name for p in iter_params(spec) if p.tied_to is not None),
    )
    for param in iter_params(spec):
        array = tensors.get(param.name)
        if array is None:
            continue
        if array.shape != param.shape:
            raise UserError(
                f"{where}: {param.name!r} has shape {list(array.shape)}, "
                f"the config says {list(param.shape)}"
            )
        if param.tied_to is not None:
            equal.append(
                (f"{param.name} and {param.tied_to} (tied)", array, tensors[param.tied_to])
            )
            continue
        kept[param.name] = array
    return kept, equal


def canonical_params(spec: ArchSpec) -> list[ParamSpec]:
    """The tensors that have storage of their own."""
    return [p for p in iter_params(spec) if p.tied_to is None]


def as_user_error(what: str, make: Callable[[], T]) -> T:
    """Run something of ``fastllm_planner.arch``; its ``ArchError`` becomes a ``UserError``."""
    try:
        return make()
    except ArchError as error:
        raise UserError(f"{what}: {error}" if what else str(error), error.hint) from None
