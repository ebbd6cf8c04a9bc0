"""The report's pictures, each an SVG string made from a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastllm_planner.hardware import GIB
from fastllm_planner.memory import estimate_memory
from fastllm_planner.memory_parts import PARTS, memory_parts
from fastllm_planner.plan import Plan
from fastllm_planner.plan_text import TIME_PARTS, duration
from fastllm_planner.report.schedule import bubble_share, simulate
from fastllm_planner.report.svg import box, figure, legend, line, polygon, text, ticks

WIDTH = 860.0
LEFT, RIGHT = 58.0, 16.0
MAX_BARS = 32
MAX_GANTT_RANKS, MAX_GANTT_PASSES = 16, 1200


@dataclass(frozen=True)
class _Frame:
    """A plot area with a value axis on the left, in GiB or any other unit."""

    top: float
    height: float
    highest: float
    unit: str

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - value / self.highest)

    def axis(self) -> list[str]:
        parts: list[str] = []
        for tick in ticks(self.highest):
            if tick > self.highest * 1.001:
                continue
            parts.append(line(LEFT, self.y(tick), WIDTH - RIGHT, self.y(tick), "grid"))
            parts.append(text(LEFT - 8, self.y(tick) + 4, f"{tick:g}", anchor="end"))
        return [*parts, text(LEFT - 8, self.top - 12, self.unit, anchor="end")]


def _present(parts: Sequence[dict[str, float]]) -> list[tuple[str, str]]:
    """Memory parts that are visible somewhere, with their labels."""
    peak = max(sum(part.values()) for part in parts)
    return [(k, label) for k, label in PARTS if max(p[k] for p in parts) > 0.002 * peak]


def memory_by_stage(plan: Plan) -> str:
    """Stacked bars, one per pipeline stage, against the device's memory."""
    stages = plan.memory.stages
    shown = list(stages)
    if len(stages) > MAX_BARS:  # the ends differ, the middle is a slope: every k-th tells it
        keep = {round(i * (len(stages) - 1) / (MAX_BARS - 1)) for i in range(MAX_BARS)}
        shown = [stage for stage in stages if stage.stage in keep]
    parts = [{k: v / GIB for k, v in memory_parts(stage).items()} for stage in shown]
    capacity = plan.job.cluster.device.memory_bytes / GIB
    highest = max(capacity, plan.memory.required / GIB) * 1.06
    frame = _Frame(28, 250, highest, "GiB")
    room = (WIDTH - LEFT - RIGHT) / len(shown)
    width = min(90.0, room * 0.78)
    body = frame.axis()
    for index, (stage, part) in enumerate(zip(shown, parts, strict=True)):
        x = LEFT + room * (index + 0.5) - width / 2
        base = 0.0
        for key, label in PARTS:
            value = part[key]
            tip = f"stage {stage.stage}, {label}: {value:.2f} GiB of {stage.required / GIB:.2f}"
            top = frame.y(base + value)
            body.append(box(x, top, width, frame.y(base) - top, f"m-{key}", tip))
            base += value
        full = f"stage {stage.stage}: {stage.layers} layers, {base:.2f} GiB of {capacity:.1f}"
        body.append(
            box(x, frame.y(base), width, frame.y(0) - frame.y(base), "hit", full, focus=True)
        )
        body.append(
            text(x + width / 2, frame.top + frame.height + 18, f"{stage.stage}", anchor="middle")
        )
        if len(shown) <= 16:
            body.append(text(x + width / 2, frame.y(base) - 5, f"{base:.1f}", anchor="middle"))
    body += _capacity_line(frame, capacity, plan)
    body.append(text(WIDTH / 2, frame.top + frame.height + 38, "pipeline stage", anchor="middle"))
    body += legend(LEFT, frame.top + frame.height + 62, _keyed(_present(parts), "m"), WIDTH - RIGHT)
    return figure(WIDTH, 370, "Memory of each pipeline stage by part, in GiB", body)


def _keyed(entries: Sequence[tuple[str, str]], prefix: str) -> list[tuple[str, str]]:
    return [(f"{prefix}-{key}", label) for key, label in entries]


def _capacity_line(frame: _Frame, capacity: float, plan: Plan) -> list[str]:
    y = frame.y(capacity)
    label = f"{plan.job.cluster.device.name}: {capacity:.1f} GiB"
    return [
        line(LEFT, y, WIDTH - RIGHT, y, "limit"),
        text(WIDTH - RIGHT, y - 6, label, anchor="end", kind="limit-label"),
    ]


def sequence_lengths(plan: Plan) -> list[int]:
    """From an eighth to eight times the plan's, in doublings, as far as the layout divides them."""
    layout = plan.layout
    unit = 2 * layout.cp * layout.tp
    base = layout.seq_len
    lengths = [base >> i for i in (3, 2, 1) if base >> i] + [base << i for i in range(4)]
    return [length for length in lengths if length % unit == 0 or length == base]


def memory_by_sequence(plan: Plan) -> str:
    """Stacked areas of the fullest rank against the sequence length, all else as planned."""
    job = plan.job
    lengths = sequence_lengths(plan)
    parts: list[dict[str, float]] = []
    for length in lengths:
        layout = replace(plan.layout, seq_len=length)
        stages = estimate_memory(job.spec, layout, job.cluster, job.backend).stages
        worst = max(stages, key=lambda stage: stage.required)
        parts.append({k: v / GIB for k, v in memory_parts(worst).items()})
    capacity = job.cluster.device.memory_bytes / GIB
    highest = min(max(sum(p.values()) for p in parts), 3 * capacity)
    frame = _Frame(28, 250, max(highest, capacity) * 1.06, "GiB")
    span = WIDTH - LEFT - RIGHT - 40
    xs = [LEFT + 20 + span * i / max(1, len(lengths) - 1) for i in range(len(lengths))]
    body = frame.axis()
    below = [0.0] * len(lengths)
    for key, label in PARTS:
        above = [b + p[key] for b, p in zip(below, parts, strict=True)]
        edge = [(x, max(frame.top, frame.y(v))) for x, v in zip(xs, above, strict=True)]
        floor = [(x, max(frame.top, frame.y(v))) for x, v in zip(xs, below, strict=True)]
        body.append(polygon([*edge, *reversed(floor)], f"m-{key}", label))
        below = above
    for x, length, total in zip(xs, lengths, below, strict=True):
        bold = "strong" if length == plan.layout.seq_len else ""
        body.append(
            text(x, frame.top + frame.height + 18, f"{length:,}", anchor="middle", kind=bold)
        )
        tip = f"{length:,} tokens: {total:.1f} GiB on the fullest rank"
        body.append(box(x - 8, frame.top, 16, frame.height, "hit", tip, focus=True))
    body += _capacity_line(frame, capacity, plan)
    caption = "tokens per sequence (the plan's in bold)"
    body.append(text(WIDTH / 2, frame.top + frame.height + 38, caption, anchor="middle"))
    body += legend(LEFT, frame.top + frame.height + 62, _keyed(_present(parts), "m"), WIDTH - RIGHT)
    return figure(WIDTH, 370, "Memory of the fullest rank against the sequence length", body)


def step_waterfall(plan: Plan) -> str:
    """What the step is made of, each part starting where the last one ends."""
    step = plan.step
    rows = [(label, key, getattr(step, key)) for key, label in TIME_PARTS]
    rows = [row for row in rows if row[2] > 0.0005 * step.total]
    left, height = 216.0, 26.0
    scale = (WIDTH - left - 130) / max(step.total, 0.8 * step.high)
    body: list[str] = []
    at = 0.0
    for index, (label, key, seconds) in enumerate(rows):
        y = 10 + index * height
        share = f"{duration(seconds)} ({100 * seconds / step.total:.1f}%)"
        x = left + at * scale
        body.append(text(left - 10, y + 15, label, anchor="end"))
        body.append(
            box(x, y, max(seconds * scale, 1.5), 18, f"t-{key}", f"{label}: {share}", focus=True)
        )
        body.append(text(x + seconds * scale + 8, y + 14, share))
        at += seconds
    y = 10 + len(rows) * height
    total = f"{duration(step.total)} ({duration(step.low)} to {duration(step.high)})"
    body.append(text(left - 10, y + 15, "step", anchor="end", kind="strong"))
    body.append(box(left, y, step.total * scale, 18, "t-total", f"step: {total}", focus=True))
    low, high = left + step.low * scale, min(left + step.high * scale, WIDTH - 4)
    body.append(line(low, y + 26, high, y + 26, "whisker"))
    body += [line(x, y + 21, x, y + 31, "whisker") for x in (low, high)]
    body.append(text(left + 6, y + 14, total, kind="on-dark"))
    return figure(WIDTH, y + 38, "Step time by cause", body)


def pipeline_schedule(plan: Plan) -> str:
    """Gantt chart of the schedule's first micro-batches; a sentence where there is no pipeline."""
    layout = plan.layout
    if layout.pp == 1:
        return (
            "<p>One stage: each rank runs its "
            f"{layout.micro_batches} micro-batches one after the other, without a bubble.</p>"
        )
    ranks, chunks = layout.pp, layout.virtual_stages
    # Twice the depth shows warm-up, steady state and cool-down; more would only repeat the middle.
    micro = min(layout.micro_batches, 2 * ranks)
    while micro > ranks and 2 * ranks * micro * chunks > MAX_GANTT_PASSES:
        micro -= ranks
    if 2 * ranks * micro * chunks > 4 * MAX_GANTT_PASSES:
        return (
            f"<p>{ranks} stages in {chunks} chunks each: too many passes to draw "
            f"({2 * ranks * micro * chunks:,}).</p>"
        )
    passes = simulate(ranks, micro, chunks)
    length = max(p.end for p in passes)
    height = 22.0 if ranks <= MAX_GANTT_RANKS else 12.0
    scale = (WIDTH - LEFT - RIGHT) / length
    body: list[str] = []
    for rank in range(ranks):
        if height > 15 or rank % 4 == 0:
            body.append(text(LEFT - 8, 22 + rank * height, f"{rank}", anchor="end"))
        body.append(box(LEFT, 8 + rank * height, length * scale, height - 3, "idle"))
    for p in passes:
        kind = "forward" if p.kind == "forward" else "backward"
        tip = f"rank {p.rank}, micro-batch {p.micro_batch}"
        if chunks > 1:
            tip += f", chunk {p.chunk}"
        shade = "-late" if p.chunk % 2 else ""
        width = (p.end - p.start) * scale
        x, y = LEFT + p.start * scale, 8 + p.rank * height
        body.append(
            box(x, y, max(width - 0.6, 0.4), height - 3, f"g-{kind}{shade}", f"{tip}, {kind}")
        )
        if width > 14 and height > 15:
            label = f"{p.micro_batch}"
            body.append(
                text(x + width / 2, y + 14, label, anchor="middle", size=10, kind="on-dark")
            )
    bottom = 8 + ranks * height
    waiting = bubble_share(passes, ranks)
    body += legend(
        LEFT,
        bottom + 22,
        [("g-forward", "forward"), ("g-backward", "backward"), ("idle", "idle")],
        WIDTH,
    )
    m, p = layout.micro_batches, layout.pp
    whole = (p - 1) / (m * chunks + p - 1)
    note = f"{micro} of {m} micro-batches: {100 * waiting:.0f}% idle; all {m}: {100 * whole:.1f}%"
    body.append(text(WIDTH - RIGHT, bottom + 22, note, anchor="end"))
    return figure(WIDTH, bottom + 32, "Pipeline schedule by rank", body)


@dataclass(frozen=True)
class Cell:
    """One (TP, PP): tokens/s per device of its best layout, or why there is none."""

    tp: int
    pp: int
    speed: float | None
    words: str


def parallel_map(cells: Sequence[Cell], chosen: tuple[int, int]) -> str:
    """Heat map: TP across, PP down, colour by speed relative to the best."""
    tps, pps = sorted({c.tp for c in cells}), sorted({c.pp for c in cells})
    best = max((c.speed for c in cells if c.speed), default=1.0)
    width = min(120.0, (WIDTH - LEFT - RIGHT) / len(tps))
    height = 34.0
    body = [text(LEFT, 14, "TP →   PP ↓")]
    for column, tp in enumerate(tps):
        body.append(
            text(LEFT + (column + 0.5) * width, 34, f"{tp}", anchor="middle", kind="strong")
        )
    for cell in cells:
        x, y = LEFT + tps.index(cell.tp) * width, 42 + pps.index(cell.pp) * height
        if cell.speed is None:
            kind, label = "h-none", "–"
        else:
            kind, label = f"h-{min(9, int(10 * cell.speed / best))}", f"{cell.speed:,.0f}"
        tip = f"TP {cell.tp}, PP {cell.pp}: {cell.words}"
        body.append(box(x, y, width - 3, height - 3, kind, tip, focus=True))
        ink = ""
        if cell.speed:
            ink = "on-dark" if cell.speed > 0.6 * best else "on-light"
        body.append(text(x + width / 2 - 1, y + 20, label, anchor="middle", kind=ink))
        if (cell.tp, cell.pp) == chosen:
            body.append(box(x, y, width - 3, height - 3, "h-chosen"))
    for row, pp in enumerate(pps):
        body.append(text(LEFT - 10, 62 + row * height, f"{pp}", anchor="end", kind="strong"))
    return figure(WIDTH, 50 + len(pps) * height, "Tokens per second and device by TP and PP", body)
