"""Cells as papers and logs spell them: understood, or refused with a reason; never guessed."""

import pytest

from fastllm_planner.backends import detect_backend
from fastllm_planner.row_words import (
    RowError,
    dtype,
    node_bandwidth,
    positive,
    recompute,
    shard_group,
    switch,
    whole,
    zero_stage,
)


@pytest.mark.parametrize(("text", "value"), [("8", 8), ("8.0", 8), ("1,024", 1024), ("2e3", 2000)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole({"n": text}, "n") == value


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e400", "1e300", "0", "-3", "7.5", "many"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RowError):
        whole({"n": text}, "n")


def test_an_empty_cell_takes_its_default_or_is_refused() -> None:
    assert whole({}, "n", 4) == 4
    with pytest.raises(RowError, match="n is not given"):
        whole({}, "n")


@pytest.mark.parametrize("text", ["inf", "1e400", "nan", "-1", "0", "?", "16.27 s", "1e-320"])
def test_what_is_no_measurement_is_refused(text: str) -> None:
    with pytest.raises(RowError, match="t="):
        positive({"t": text}, "t")


def test_an_empty_measurement_is_none() -> None:
    assert positive({"t": ""}, "t") is None
    assert positive({"t": "1,024.5"}, "t") == 1024.5


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("True", True), ("yes", True), ("FA2", True), ("0", False), ("False", False),
     ("off", False), ("", None)],
)  # fmt: skip
def test_switches(text: str, value: bool | None) -> None:
    assert switch({"flash": text}, "flash", yes="fa.*") is value


def test_an_unknown_switch_is_refused() -> None:
    with pytest.raises(RowError, match="neither yes nor no"):
        switch({"sp": "perhaps"}, "sp")


@pytest.mark.parametrize(
    ("text", "value"),
    [("bf16", "bf16"), ("BF16", "bf16"), ("bfloat16", "bf16"), ("amp_bf16", "bf16"), ("", "bf16"),
     ("bf16-mixed", "bf16"), ("FP8", "fp8"), ("mxfp8", "fp8"), ("float16", "fp16")],
)  # fmt: skip
def test_dtypes(text: str, value: str) -> None:
    assert dtype(text) == value


@pytest.mark.parametrize("text", ["nvfp4", "int8", "tf32"])
def test_a_dtype_that_is_not_modelled_is_refused(text: str) -> None:
    with pytest.raises(RowError):
        dtype(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("full", ("full", 1.0)), ("Full", ("full", 1.0)), ("full (uniform 1)", ("full", 1.0)),
        ("uniform", ("full", 1.0)), ("none", ("none", 1.0)), ("None", ("none", 1.0)),
        ("no", ("none", 1.0)), ("selective", ("selective", 1.0)),
        ("Selective op", ("selective", 1.0)),
        ("selective(every other layer)", ("full", 0.5)), ("selective 1/4", ("full", 0.25)),
        ("full 3/8 layers", ("full", 0.375)), ("full (1 of 2 layers)", ("full", 0.5)),
    ],
)  # fmt: skip
def test_recomputation(text: str, value: tuple[str, float]) -> None:
    assert recompute(text, strict=True) == value


@pytest.mark.parametrize("text", ["", "varies", "some"])
def test_recomputation_has_to_be_stated_where_a_row_is_scored(text: str) -> None:
    assert recompute(text, strict=False) == ("none", 1.0)
    with pytest.raises(RowError):
        recompute(text, strict=True)


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("FSDP", 3), ("HSDP", 3), ("fsdp2", 3), ("FULL_SHARD", 3), ("HYBRID_SHARD", 3),
        ("SHARD_GRAD_OP", 2), ("NO_SHARD", 0), ("DDP", 0), ("none", 0), ("fsdp-grad_op(2)", 2),
        ("dist-opt", 1), ("distributed optimizer", 1), ("dist-opt(1)", 1), ("1+ (varies)", 1),
        ("ZeRO-2", 2), ("zero3", 3), ("0", 0), ("3.0", 3),
        ("fsdp: optimizer+grads sharded, params not resharded after fwd (2)", 2),
    ],
)  # fmt: skip
def test_sharding(text: str, stage: int) -> None:
    assert zero_stage(text) == stage


@pytest.mark.parametrize("text", ["varies", "ZeRO-7", "(9)"])
def test_sharding_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(RowError):
        zero_stage(text)


def test_hybrid_sharding_stays_inside_a_node_unless_it_says_more() -> None:
    assert shard_group("HSDP", "", 64, 8) == 8
    assert shard_group("HSDP(3), shard group 32", "", 64, 8) == 32
    assert shard_group("fsdp(3)", "", 64, 8) == 0
    assert shard_group("HSDP", "", 8, 8) == 0


def test_network_words() -> None:
    assert node_bandwidth("8x400Gb IB") == pytest.approx(400e9)
    assert node_bandwidth("1600 Gbps node") == pytest.approx(200e9)
    assert node_bandwidth("fast") is None


@pytest.mark.parametrize(
    ("text", "sharding", "name", "named"),
    [
        ("pytorch/torchtitan perf", "fsdp2(3)", "fsdp", True),
        ("pytorch/torchtitan perf, torch.compile", "fsdp2(3)", "fsdp-compiled", True),
        ("pytorch/torchtitan perf, compiled", "fsdp2(3)", "fsdp-compiled", True),
        ("pytorch/torchtitan perf, no compile", "fsdp2(3)", "fsdp", True),
        ("pytorch/torchtitan perf, compile=off", "fsdp2(3)", "fsdp", True),
        ("pytorch/torchtitan perf, not compiled", "fsdp2(3)", "fsdp", True),
        ("somebody's table, compile on", "FSDP", "fsdp-compiled", False),
        ("somebody's table", "HSDP", "fsdp", False),
        ("llm-foundry, compiled kernels", "fsdp(3)", "llm-foundry", True),
    ],
)
def test_compilation_makes_another_stack(text: str, sharding: str, name: str, named: bool) -> None:
    found = detect_backend(text, sharding, flash=True)
    assert (found[0].name, found[1]) == (name, named)
