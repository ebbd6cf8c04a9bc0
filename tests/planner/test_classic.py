"""The classic calculator, against figures computed apart from the code (in 40-digit decimals)."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from fastllm_planner.__main__ import main
from fastllm_planner.classic import ClassicInput, compute

LLAMA_70B = [
    *("classic", "--hidden", "8192", "--layers", "80", "--seq-len", "4096", "--vocab", "32000"),
    *("--nodes", "6", "--gpus-per-node", "4", "--gpu-memory", "80", "--batch-size", "8"),
    *("--tokens", "0.7B", "--tflops", "140"),
]

REFERENCE = """\
-----------Model_Size and GPU_Mem-----------
+--------------+------------------------+----------------------+
| Model size/B | ratio(NHIDDEN/NLAYERS) | Usable_mem_per_GPU/G |
+--------------+------------------------+----------------------+
|    64.72     |          102           |          79          |
+--------------+------------------------+----------------------+
-----------With Mixed Precision(bp16)-----------
-----Memory_reference_indicator(Batch_size=8)-----
+-------------------------+----------+------------------+-------------------+
| Module                  |   Size/B |   Eval_memory/GB |   Train_momery/GB |
+=========================+==========+==================+===================+
| emb                     |     0.3  |             0.59 |              4.73 |
+-------------------------+----------+------------------+-------------------+
| one_layer               |     0.81 |             1.61 |             12.89 |
+-------------------------+----------+------------------+-------------------+
| input                   |     0.27 |             0.54 |              0.54 |
+-------------------------+----------+------------------+-------------------+
| activation(batchsize=1) |     9.55 |            19.11 |             19.11 |
+-------------------------+----------+------------------+-------------------+
| ALL                     |    92.01 |           184.03 |           1090.17 |
+-------------------------+----------+------------------+-------------------+
-----Strategy_reference_indicator(Batch_size=8)-----
+------------+--------------------------+---------------------------+
| Strategy   |   Eval_memory_per_gpu/GB |   Train_momery_per_gpu/GB |
+============+==========================+===========================+
| Zero1      |                   129.45 |                    345.84 |
+------------+--------------------------+---------------------------+
| Zero2      |                   129.45 |                    221.78 |
+------------+--------------------------+---------------------------+
| Zero3      |                     5.39 |                     97.73 |
+------------+--------------------------+---------------------------+
---------------------Strategy_Recommand---------------------
You can't use pure Zero1 or Zero2 strategy.
Recommand_Strategy:
+-----------------+------+------+------+---------------------------+-----------------+
| Zero            |   DP |   TP |   PP |   Train_momery_per_gpu/GB |   Trianing_days |
+=================+======+======+======+===========================+=================+
| Zero1+TP+PP     |    1 |    4 |    6 |                     56.79 |            1.25 |
+-----------------+------+------+------+---------------------------+-----------------+
| Zero3+(offload) |   24 |    1 |    1 |                     97.73 |            1.25 |
+-----------------+------+------+------+---------------------------+-----------------+
Please find the best batch_size by adjusting BATCH_SIZE
"""


def test_llama_70b_prints_the_reference_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(LLAMA_70B) == 0
    out = capsys.readouterr().out
    assert out.startswith(REFERENCE)
    assert "fastllm-planner plan" in out.removeprefix(REFERENCE)


def test_model_gives_the_same_sizes_as_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["classic", "--model", "llama-2-70b", *LLAMA_70B[9:]]
    assert main(args) == 0
    assert capsys.readouterr().out.startswith(REFERENCE)


@dataclass(frozen=True)
class Case:
    """h, l, s, v, nodes, GPUs per node, GB, batch, tokens, TFLOPS → expected figures."""

    sizes: tuple[int, int, int, int, int, int, float, int, float, float]
    model: float
    activation_one: float
    total: float
    zero: tuple[float, float, float]
    days: float
    outcome: str
    rows: tuple[tuple[str, int, int, int, float], ...]


LLAMA_7B = (4096, 32, 4096, 32000)
LLAMA_13B = (5120, 40, 4096, 32000)
GPT_70B = (8192, 80, 4096, 32000)
CASES = {
    "zero1": Case(
        (4096, 32, 4096, 125696, 1, 4, 80, 8, 7e8, 140),
        *(6.97, 4.27, 136.03, (73.26, 62.8, 52.34), 0.81),
        *("zero1", (("Zero1", 4, 1, 1, 73.26),)),
    ),
    "zero1_with_many_ranks": Case(
        (2048, 22, 2048, 32000, 10, 8, 80, 1, 1e9, 140),
        *(1.18, 1.77, 22.39, (8.44, 6.11, 3.79), 0.01),
        *("zero1", (("Zero1", 80, 1, 1, 8.44),)),
    ),
    "zero1_2.89_GB_over": Case(
        (*LLAMA_7B, 2, 8, 38, 1, 1e10, 140),
        *(6.59, 4.27, 114.04, (39.89, 27.53, 15.17), 2.72),
        *("zero1_offload", (("Zero1+offload", 16, 1, 1, 39.89),)),
    ),
    "zero2_4.89_GB_over": Case(
        (*LLAMA_7B, 2, 8, 36, 1, 1e10, 140),
        *(6.59, 4.27, 114.04, (39.89, 27.53, 15.17), 2.72),
        *("zero2", (("Zero2", 16, 1, 1, 27.53),)),
    ),
    "one_node_holds_it": Case(
        (*LLAMA_13B, 16, 8, 38, 1, 1e12, 140),
        *(12.77, 5.34, 215.03, (63.0, 37.66, 12.32), 65.98),
        *("zero1_tp", (("Zero1+TP", 16, 8, 1, 8.92), ("Zero3+(offload)", 128, 1, 1, 12.32))),
    ),
    "pipeline_and_data_parallel": Case(
        (*GPT_70B, 64, 8, 80, 1, 1e12, 180),
        *(64.72, 9.55, 1054.76, (279.59, 150.39, 21.2), 65.03),
        *("zero1_tp_pp", (("Zero1+TP+PP", 32, 8, 2, 20.09), ("Zero3+(offload)", 512, 1, 1, 21.2))),
    ),
    "dp_1_takes_every_node_as_a_stage": Case(
        (*GPT_70B, 3, 8, 80, 8, 7e8, 140),
        *(64.72, 9.55, 1090.17, (345.84, 221.78, 97.73), 1.25),
        *("zero1_tp_pp", (("Zero1+TP+PP", 1, 8, 3, 49.97), ("Zero3+(offload)", 24, 1, 1, 97.73))),
    ),
    "not_enough": Case(
        (*GPT_70B, 1, 8, 80, 8, 1e12, 180),
        *(64.72, 9.55, 1090.17, (410.56, 297.29, 184.03), 4161.79),
        *("not_enough", ()),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_branch(case: Case) -> None:
    result = compute(ClassicInput(*case.sizes))
    assert round(result.sizes.model, 2) == case.model
    assert round(result.sizes.activation_one, 2) == case.activation_one
    assert result.total == case.total
    assert result.zero_train == case.zero
    assert result.days == case.days
    assert result.outcome == case.outcome
    got = tuple((row.name, row.dp, row.tp, row.pp, row.memory) for row in result.strategies)
    assert got == case.rows
    assert all(row.days == case.days for row in result.strategies)


def test_without_checkpointing_and_with_scores() -> None:
    # 34·b·s·h·l and + 5·a·s²·b·l, no square root; one GPU holds every ZeRO stage alike.
    sizes = (1024, 24, 1024, 50304, 1, 1, 24, 4, 1e10, 40)
    flash = compute(ClassicInput(*sizes, gradient_checkpointing=False))
    assert round(flash.sizes.activation_one, 2) == 0.86
    assert flash.total == 12.53
    assert flash.zero_train == (12.53, 12.53, 12.53)
    scores = compute(ClassicInput(*sizes, gradient_checkpointing=False, heads=16))
    assert round(scores.sizes.activation_one, 2) == 2.87
    assert scores.total == 28.63
    assert (flash.outcome, scores.outcome) == ("zero1", "not_enough")


def test_experts_repeat_the_mlp_and_time_counts_the_active_ones() -> None:
    inputs = ClassicInput(*(*LLAMA_7B, 8, 8, 80, 1, 1e12, 180), experts=8, active_experts=2)
    result = compute(inputs)
    assert round(result.sizes.model, 2) == 36.66  # 32·(4h² + 64h² + 8h + 6h) + vh + sh + h
    assert round(result.sizes.activation_one, 2) == 5.33  # 34 + 19 bytes for the second expert
    assert result.zero_train == (164.2, 92.03, 19.87)
    assert result.days == 87.51  # 8·D·N with 2 of 8 experts, over 64 GPUs


def test_exit_1_and_zero_infinity_when_memory_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    args = [*LLAMA_70B]
    args[args.index("--nodes") + 1] = "2"
    assert main(args) == 1
    out = capsys.readouterr().out
    assert "Minimal_Memory_needed:1090.17GB, Give_usable_memory:79*8=632GB" in out
    assert "ZeRO-Infinity" in out
    assert "Recommand_Strategy" not in out


def test_json_is_one_object_with_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LLAMA_70B, "--json"]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["schema"] == 1
    assert data["total"] == 1090.17
    assert data["strategies"][0] == {
        **{"name": "Zero1+TP+PP", "dp": 1, "tp": 4, "pp": 6, "memory": 56.79, "days": 1.25}
    }
    assert captured.err == ""


@pytest.mark.parametrize(("tokens", "days"), [("0.7", 1.25), ("700M", 1.25), ("1.4e9", 2.5)])
def test_tokens_spellings(tokens: str, days: float, capsys: pytest.CaptureFixture[str]) -> None:
    args = [*LLAMA_70B, "--json"]
    args[args.index("--tokens") + 1] = tokens
    assert main(args) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["days"] == days
    assert ("read as 0.7 billion" in captured.err) == (tokens == "0.7")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--hidden", "0"], "not a positive whole number"),
        (["--tokens", "nan"], "not a positive number"),
        (["--tokens", "many"], "not a number"),
        (["--gpu-memory", "1"], "above 1 GB"),
        (["--active-experts", "2"], "--active-experts 2 is more than --experts 1"),
        (["--model", "llama-2-70"], "unknown model 'llama-2-70'"),
        (["--model", "missing/config.json"], "no file missing/config.json"),
    ],
)
def test_bad_input_is_one_line(
    extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LLAMA_70B, *extra]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err


def test_missing_sizes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classic", "--tokens", "1B", "--hidden", "4096"]) == 2
    assert "missing --layers, --seq-len, --vocab" in capsys.readouterr().err
