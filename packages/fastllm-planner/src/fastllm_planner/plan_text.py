"""A plan in words and tables: the verdict first, then memory, time, alternatives, assumptions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fastllm_planner.columns import columns
from fastllm_planner.efficiency import shipped_cells
from fastllm_planner.hardware import GIB
from fastllm_planner.layout import Layout
from fastllm_planner.memory import StageMemory
from fastllm_planner.memory_parts import memory_parts
from fastllm_planner.plan import Job, Plan
from fastllm_planner.search import SearchResult

TIME_PARTS = (
    ("compute", "compute"),
    ("recompute", "recomputation"),
    ("tp_comm", "TP communication"),
    ("cp_comm", "CP communication"),
    ("ep_comm", "EP communication"),
    ("pp_comm", "PP communication"),
    ("dp_comm", "DP communication"),
    ("bubble", "pipeline bubble"),
    ("optimizer", "optimizer"),
    ("offload", "offload"),
    ("overhead", "launch and jitter"),
)

MAX_STAGE_ROWS = 12
WIDTH = 100


def count(value: float) -> str:
    """A large count with its unit: 7e8 → 700M, 1.5e12 → 1.5T."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (1000 * seconds, "ms")
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def days(value: float) -> str:
    if value >= 1:
        return f"{value:.1f} days"
    return f"{24 * value:.1f} hours" if value * 24 >= 1 else f"{1440 * value:.1f} minutes"


def days_range(low: float, high: float) -> str:
    """``16.2 to 24.3 days``, in the larger one's unit."""
    words = days(high)
    unit, scale = {"days": ("days", 1.0), "hours": ("hours", 24.0)}.get(
        words.split()[1], ("minutes", 1440.0)
    )
    return f"{low * scale:.1f} to {high * scale:.1f} {unit}"


def strategy_words(layout: Layout) -> str:
    """``ZeRO-1, DP 16 × TP 4, micro-batch 2, full recomputation``: only what is switched on."""
    sizes = [("DP", layout.dp), ("TP", layout.tp), ("PP", layout.pp), ("CP", layout.cp)]
    shown = " × ".join(f"{name} {size}" for name, size in sizes if size > 1 or name == "DP")
    words = [f"ZeRO-{layout.zero_stage}", shown]
    if layout.ep > 1:
        words.append(f"EP {layout.ep}")
    if layout.virtual_stages > 1:
        words.append(f"{layout.virtual_stages} virtual stages")
    words.append(f"micro-batch {layout.micro_batch} × {layout.micro_batches}")
    if layout.recompute != "none":
        words.append(f"{layout.recompute} recomputation")
    if layout.sequence_parallel:
        words.append("sequence parallelism")
    if layout.offload != "none":
        words.append(f"{layout.offload.replace('+', ' and ')} offloaded")
    return ", ".join(words)


def where(job: Job) -> str:
    device = job.cluster.device
    processes = "process" if job.cluster.n_gpus == 1 else "processes"
    if device.architecture == "cpu":
        return f"{job.cluster.n_gpus} CPU {processes} of this machine"
    return f"{job.cluster.n_gpus} × {device.name}"


def verdict(plan: Plan) -> str:
    """One sentence: does it fit, how full, how fast, how long."""
    job = plan.job
    worst = max(plan.memory.stages, key=lambda stage: stage.required)
    capacity = job.cluster.device.memory_bytes / GIB
    used = f"{plan.memory.required / GIB:.1f} of {capacity:.1f} GiB on the fullest rank"
    if plan.layout.pp > 1:
        used += f" (stage {worst.stage})"
    subject = f"{job.name} on {where(job)}"
    if not plan.fits:
        return f"{subject} does not fit: {used}."
    word = "fits, barely" if plan.tight else "fits"
    sentence = f"{subject} {word}: {used}"
    if job.cluster.device.architecture != "cpu":  # a CPU's peak is a prior: no MFU to speak of
        sentence += f", about {100 * plan.step.mfu():.0f}% MFU (full attention)"
    if plan.days is not None and job.tokens is not None:
        return f"{sentence}, {days(plan.days)} for {count(job.tokens)} tokens."
    return f"{sentence}, {duration(plan.step.total)} a step."


def render_plan(plan: Plan, note: str = "") -> str:
    """Verdict, strategy (with a ``note`` on it), memory by stage, time by cause."""
    wrap = textwrap.TextWrapper(WIDTH)
    return "\n".join(
        [
            verdict(plan),
            "",
            f"Strategy: {strategy_words(plan.layout)}.",
            *([wrap.fill(note)] if note else []),
            "",
            "Memory per rank at its peak, GiB",
            memory_table(plan),
            "",
            *_time_lines(plan),
        ]
    )


def memory_table(plan: Plan) -> str:
    """One row per pipeline stage; stages alike in every figure share a row."""
    rows = [_stage_row(stage) for stage in plan.memory.stages]
    grouped: list[tuple[int, int, list[str]]] = []
    for index, row in enumerate(rows):
        if grouped and grouped[-1][2] == row:
            grouped[-1] = (grouped[-1][0], index, row)
        else:
            grouped.append((index, index, row))
    note = ""
    if len(grouped) > MAX_STAGE_ROWS + 1:  # the ends tell the slope between them
        kept = MAX_STAGE_ROWS // 2
        first_hidden, last_hidden = grouped[kept][0], grouped[-kept - 1][1]
        note = f"\nStages {first_hidden} to {last_hidden} are left out; --json has them all."
        grouped = [*grouped[:kept], *grouped[-kept:]]
    headers = (
        *("stage", "layers", "weights", "grads", "optim", "activ", "transient", "gathered"),
        *("runtime", "needed"),
    )
    table = [
        [f"{first}" if first == last else f"{first}-{last}", *row] for first, last, row in grouped
    ]
    lines = columns(headers, table, drop={"gathered": "0.00"}) + note
    if plan.memory.host_bytes:
        lines += f"\nHost memory per node for offload: {plan.memory.host_bytes / GIB:.1f} GiB"
    if plan.memory.nvme_bytes:
        lines += f", NVMe per node: {plan.memory.nvme_bytes / GIB:.1f} GiB"
    return lines


def _stage_row(stage: StageMemory) -> list[str]:
    parts = [*memory_parts(stage).values(), stage.required]
    return [str(stage.layers), *(f"{part / GIB:.2f}" for part in parts)]


def _time_lines(plan: Plan) -> list[str]:
    step, job = plan.step, plan.job
    shares = [(label, getattr(step, key) / step.total) for key, label in TIME_PARTS]
    shown = ", ".join(f"{label} {100 * share:.0f}%" for label, share in shares if share >= 0.005)
    on_cpu = job.cluster.device.architecture == "cpu"
    each = "process" if on_cpu else "GPU"
    peak_dtype = "bf16" if job.cluster.device.supports("bf16") else "fp16"
    source = "a prior: not measured" if on_cpu else f"the dense {peak_dtype} peak"
    lines = [
        f"Step      {duration(step.total)} ({duration(step.low)} to {duration(step.high)}): "
        f"{shown}",
        f"Speed     {step.tokens_per_s_per_gpu:,.0f} tokens/s per {each}, "
        f"{step.tokens_per_s_per_gpu * step.devices:,.0f} tokens/s",
        f"TFLOPs    {step.model_tflops_full:.4g} model (full attention), "
        f"{step.model_tflops_causal:.4g} model (causal), "
        f"{step.hardware_tflops:.4g} hardware, per {each}",
        f"MFU       {100 * step.mfu('full'):.1f}% (full attention), "
        f"{100 * step.mfu('causal'):.1f}% (causal), of {step.peak_tflops:.4g} TFLOPs, {source}",
    ]
    if plan.days is not None and plan.days_range is not None and plan.gpu_hours is not None:
        low, high = plan.days_range
        lines.append(
            f"Training  {days(plan.days)} ({days_range(low, high)}) for "
            f"{count(job.tokens or 0)} tokens at goodput {job.goodput:g}: "
            f"{plan.gpu_hours:,.0f} {each}-hours"
        )
        if plan.cost is not None:
            lines.append(f"Cost      {plan.cost:,.0f} at {job.price:g} per {each}-hour")
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 10, drop_whitespace=True)
    return [wrap.fill(line) for line in lines]


def render_alternatives(plans: Sequence[Plan]) -> str:
    """The top-k strategies, fastest first."""
    headers = (
        *("#", "ZeRO", "DP", "TP", "PP", "VPP", "CP", "EP", "micro", "recompute", "SP", "offload"),
        *("GiB", "step", "tok/s/GPU", "MFU"),
    )
    rows = [
        [
            *(str(rank), str(layout.zero_stage), str(layout.dp), str(layout.tp), str(layout.pp)),
            *(str(layout.virtual_stages), str(layout.cp), str(layout.ep), str(layout.micro_batch)),
            *(layout.recompute, "yes" if layout.sequence_parallel else "no", layout.offload),
            f"{plan.memory.required / GIB:.1f}",
            duration(plan.step.total),
            f"{plan.step.tokens_per_s_per_gpu:,.0f}",
            f"{100 * plan.step.mfu():.1f}%",
        ]
        for rank, plan in enumerate(plans, start=1)
        for layout in (plan.layout,)
    ]
    ones = dict.fromkeys(("TP", "PP", "VPP", "CP", "EP"), "1")
    table = columns(headers, rows, drop={**ones, "SP": "no", "offload": "none"})
    if any(plan.step.total < plans[0].step.total for plan in plans[1:]):
        table += "\n#1 is the simplest of those within 2% of the fastest."
    return f"Best strategies\n{table}"


def render_rejections(result: SearchResult) -> str:
    """Why every other layout is not listed, grouped by rule."""
    lines = [f"Not listed ({result.shapes} layout shapes considered, {result.priced} priced)"]
    wrap = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * 9)
    for entry in sorted(result.rejections.values(), key=lambda item: -item.count):
        lines.append(wrap.fill(f"  {entry.count:>5}  {entry.reason}"))
        example = f"{strategy_words(entry.example)}: {entry.detail}"
        lines.append(wrap.fill(f"         e.g. {example}"))
    return "\n".join(lines)


def render_no_fit(job: Job, result: SearchResult) -> str:
    """Exit 1: nothing fits, and what comes closest."""
    capacity = job.cluster.device.memory_bytes / GIB
    if result.closest is None:
        reasons = sorted(result.rejections.values(), key=lambda item: -item.count)
        why = reasons[0].detail if reasons else _no_shape(job)
        return f"{job.name} on {where(job)} cannot run: {why}."
    closest = result.closest
    needs = (
        f"{closest.peak / GIB:.1f} GiB of {capacity:.1f} GiB ({100 * job.headroom:.0f}% kept free)"
    )
    host = job.cluster.host_memory_bytes
    if closest.host and host:
        needs += f" and {closest.host / GIB:.0f} GiB of {host / GIB:.0f} GiB in each node's memory"
    if closest.nvme:
        drives = (job.cluster.nvme_bytes or 0) / GIB
        needs += f" and {closest.nvme / GIB:.0f} GiB of {drives:.0f} GiB on each node's drives"
    return (
        f"{job.name} on {where(job)} does not fit: the leanest layout needs {needs}.\n\n"
        f"It is {strategy_words(closest.layout)}.\n"
        "More GPUs, larger ones, a shorter --seq-len, more --host-memory or --nvme, or a backend "
        "with offload would change that."
    )


def _no_shape(job: Job) -> str:
    return (
        f"no dp x tp x pp x cp = {job.cluster.n_gpus} has the sizes asked for "
        f"(stages need a layer each, the model has {job.spec.layers})"
    )


def assumptions(job: Job, plan: Plan | None = None) -> list[str]:
    """What the figures rest on, a sentence each; with a ``plan`` also how exact its time is."""
    device = job.cluster.device
    if job.profile is not None:
        count_of = job.profile.measurements
        timing = f"profile of {job.profile.gpu or device.name} fitted to {count_of} measured runs"
    elif device.architecture == "cpu":
        timing = "the CPU's rates are a prior that nobody measured ('calibrate' replaces it)"
    else:
        timing = "efficiency as published runs had it, not measured on this cluster"
    if plan is not None:
        spread = plan.step.high / plan.step.total - 1.0
        timing += f"; four in five steps should fall within ±{100 * spread:.0f}%"
    facts = [
        f"{job.name}: {job.params:,} parameters; {job.dtype}; sequences of {job.seq_len}; "
        f"{job.global_batch} sequences a step "
        f"({count(job.global_batch * job.seq_len)} tokens).",
        f"{device.name}: {device.memory_bytes / GIB:.1f} GiB, "
        f"{device.matmul(job.dtype):.4g} TFLOPs large matmul ({device.matmul_source}); "
        f"{job.cluster.gpus_per_node} per node, "
        f"{job.cluster.network_bandwidth / 1e9:g} GB/s per GPU between nodes{_host(job)}.",
        f"Backend {job.backend.name}; {timing}.",
    ]
    if job.profile is None and not any(c.backend == job.backend.name for c in shipped_cells()):
        facts.append(
            f"No published series measured {job.backend.name}: its speed follows from its "
            "description and from related stacks."
        )
    if job.seq_len > job.spec.max_seq_len:
        facts.append(
            f"{job.name} has {job.spec.max_seq_len:,} positions: sequences of {job.seq_len:,} need "
            "another position encoding (rope scaling)."
        )
    if job.spec.moe is not None:
        facts.append(
            "Mixtures of experts were compared with 15 published layouts only (median error of the "
            "time 21%); their memory with none."
        )
    return facts


def render_assumptions(job: Job, plan: Plan | None = None) -> str:
    """The assumptions as an indented list of at most 100 columns."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(["Assumptions", *(wrap.fill(fact) for fact in assumptions(job, plan))])


def _host(job: Job) -> str:
    """Host memory, where a layout may use it."""
    host = job.cluster.host_memory_bytes
    if host is None or not job.backend.offload or job.cluster.device.architecture == "cpu":
        return ""
    drives = job.cluster.nvme_bytes
    nvme = f" and {drives / GIB:.0f} GiB NVMe" if drives else ""
    return f", {host / GIB:.0f} GiB host memory{nvme} per node for offload"
