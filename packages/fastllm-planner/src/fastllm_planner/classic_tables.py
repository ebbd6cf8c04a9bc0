"""The classic calculator's printed form. Headings keep their historical spelling for grep."""

from __future__ import annotations

from fastllm_planner.classic import LIMITS, TRAIN_BYTES, ClassicResult


def render(result: ClassicResult) -> str:
    """Every table and sentence of the classic calculator, and a footnote on its limits."""
    batch = result.inputs.batch_size
    lines = [
        "-----------Model_Size and GPU_Mem-----------",
        _size_table(result),
        "-----------With Mixed Precision(bp16)-----------",
        f"-----Memory_reference_indicator(Batch_size={batch})-----",
        _memory_table(result),
        f"-----Strategy_reference_indicator(Batch_size={batch})-----",
        _zero_table(result),
        "---------------------Strategy_Recommand---------------------",
        *_recommendation(result),
        "",
        "note: this method " + ";\n      ".join(LIMITS) + ".",
        "      'fastllm-planner plan' answers the same question without these shortcuts.",
    ]
    return "\n".join(lines)


def _table(rows: list[dict[str, object]], style: str = "grid") -> str:
    from tabulate import tabulate

    return tabulate(rows, headers="keys", tablefmt=style)


def _plain(value: float) -> float | int:
    rounded = round(value, 2)
    return int(rounded) if rounded == int(rounded) else rounded


def _size_table(result: ClassicResult) -> str:
    row: dict[str, object] = {
        "Model size/B": round(result.sizes.model, 2),
        "ratio(NHIDDEN/NLAYERS)": result.inputs.hidden // result.inputs.layers,
        "Usable_mem_per_GPU/G": _plain(result.usable),
    }
    return _table([row], "pretty")


def _memory_table(result: ClassicResult) -> str:
    sizes = result.sizes
    everything = sizes.model + sizes.input + sizes.activation
    rows = [
        ("emb", sizes.emb, 2 * sizes.emb, TRAIN_BYTES * sizes.emb),
        ("one_layer", sizes.layer, 2 * sizes.layer, TRAIN_BYTES * sizes.layer),
        ("input", sizes.input, 2 * sizes.input, 2 * sizes.input),
        (
            "activation(batchsize=1)",
            sizes.activation_one,
            2 * sizes.activation_one,
            2 * sizes.activation_one,
        ),
        ("ALL", everything, result.eval_total, result.total),
    ]
    return _table(
        [
            {
                "Module": name,
                "Size/B": round(size, 2),
                "Eval_memory/GB": round(evaluation, 2),
                "Train_momery/GB": round(train, 2),
            }
            for name, size, evaluation, train in rows
        ]
    )


def _zero_table(result: ClassicResult) -> str:
    pairs = zip(result.zero_eval, result.zero_train, strict=True)
    return _table(
        [
            {
                "Strategy": f"Zero{stage}",
                "Eval_memory_per_gpu/GB": evaluation,
                "Train_momery_per_gpu/GB": train,
            }
            for stage, (evaluation, train) in enumerate(pairs, start=1)
        ]
    )


def _recommendation(result: ClassicResult) -> list[str]:
    if result.outcome == "not_enough":
        gpus, usable = result.inputs.gpus, _plain(result.usable)
        return [
            f"Minimal_Memory_needed:{result.total}GB, "
            f"Give_usable_memory:{usable}*{gpus}={_plain(result.usable * gpus)}GB",
            "You may try ZeRO-Infinity(Zero3+offload_param(nvme)+offload_optimizer(nvme)) "
            "strategy, or more GPUs.",
        ]
    table = _table(
        [
            {
                "Zero": row.name,
                "DP": row.dp,
                "TP": row.tp,
                "PP": row.pp,
                "Train_momery_per_gpu/GB": row.memory,
                "Trianing_days": row.days,
            }
            for row in result.strategies
        ]
    )
    lines = [
        "Recommand_Strategy:",
        table,
        "Please find the best batch_size by adjusting BATCH_SIZE",
    ]
    if result.outcome in ("zero1_tp", "zero1_tp_pp"):
        lines.insert(0, "You can't use pure Zero1 or Zero2 strategy.")
    return lines
