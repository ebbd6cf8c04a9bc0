"""The page: a job's answer rendered with its pictures, tables and assumptions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from fastllm_planner import __version__
from fastllm_planner.accuracy import accuracy_sentence
from fastllm_planner.efficiency import shipped_cells
from fastllm_planner.emit import train_toml
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import GIB
from fastllm_planner.plan import Job, Plan, price_layout
from fastllm_planner.plan_text import (
    assumptions,
    duration,
    render_no_fit,
    strategy_words,
    verdict,
)
from fastllm_planner.report.charts import (
    Cell,
    memory_by_sequence,
    memory_by_stage,
    parallel_map,
    pipeline_schedule,
    step_waterfall,
)
from fastllm_planner.search import SearchResult, divisors, search
from fastllm_planner.search_json import result_to_json


@dataclass(frozen=True)
class Answer:
    """A job, the search's result, its plans (fastest first) and the TP × PP map."""

    job: Job
    model: str
    result: SearchResult
    plans: tuple[Plan, ...]
    cells: tuple[Cell, ...]

    @property
    def sentence(self) -> str:
        if self.plans:
            return verdict(self.plans[0])
        return render_no_fit(self.job, self.result).splitlines()[0]

    def to_json(self) -> dict[str, Any]:
        return result_to_json(self.job, self.result, self.plans, self.sentence, True)


def answer(job: Job, *, model: str, top_k: int = 5) -> Answer:
    """Search once for the plans, and once for each cell of the map."""
    result = search(job, top_k=top_k)
    plans = tuple(price_layout(job, candidate.layout) for candidate in result.ranked)
    return Answer(job, model, result, plans, tuple(map_cells(job)))


def map_cells(job: Job) -> list[Cell]:
    """The best layout of every TP inside a node and every PP that divides the rest."""
    cells: list[Cell] = []
    world = job.cluster.n_gpus
    for tp in (d for d in divisors(world) if d <= job.cluster.gpus_per_node):
        for pp in (d for d in divisors(world) if d <= min(job.spec.layers, 64)):
            if world % (tp * pp):
                cells.append(Cell(tp, pp, None, f"{tp * pp} does not divide {world} devices"))
                continue
            found = search(job, top_k=1, pinned={"tp": tp, "pp": pp})
            if found.ranked:
                best = found.ranked[0]
                speed = job.global_batch * job.seq_len / best.seconds / world
                words = f"{speed:,.0f} tokens/s, {strategy_words(best.layout)}"
                cells.append(Cell(tp, pp, speed, words))
            else:
                why = sorted(found.rejections.values(), key=lambda entry: -entry.count)
                cells.append(Cell(tp, pp, None, why[0].detail if why else "no layout"))
    return cells


def render_page(found: Answer, *, form: str = "") -> str:
    """The whole page as one string. ``form`` is HTML that ``serve`` puts above the verdict."""
    job = found.job
    body = [
        '<p class="brand">fastllm-planner</p>',
        form,
        f"<h1{'' if found.plans else ' class=no'}>{escape(found.sentence)}</h1>",
    ]
    if found.plans:
        body += [_nav(), _table(found), *_plan_sections(found), _map(found)]
    else:
        details = render_no_fit(job, found.result).splitlines()[1:]
        body += [f"<p>{escape(line)}</p>" for line in details if line]
    body += [_rejected(found), _assumptions(job), _data(found)]
    return html_page(found.sentence, "\n".join(part for part in body if part))


def html_page(title: str, body: str) -> str:
    """``body`` in the page's frame, with its style and script inline."""
    folder = files("fastllm_planner.report")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n"
        '<div id="status" role="status" aria-live="polite"></div>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _nav() -> str:
    links = (
        ("strategies", "Strategies"),
        ("pictures", "Memory and time"),
        ("map", "TP × PP"),
        ("rejected", "Not listed"),
        ("assumptions", "Assumptions"),
    )
    items = "".join(f'<a href="#{key}">{label}</a>' for key, label in links)
    return f'<nav aria-label="Sections">{items}</nav>'


def _table(found: Answer) -> str:
    heads = ("", "strategy", "GiB", "step", "tokens/s/GPU", "MFU", "")
    rows: list[str] = []
    for rank, plan in enumerate(found.plans, start=1):
        cells = (
            f"{plan.memory.required / GIB:.1f}",
            duration(plan.step.total),
            f"{plan.step.tokens_per_s_per_gpu:,.0f}",
            f"{100 * plan.step.mfu():.1f}%",
        )
        figures = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(
            f'<tr data-rank="{rank}"{" class=chosen" if rank == 1 else ""}>'
            f'<td><button class="show" aria-pressed="{str(rank == 1).lower()}" '
            f'aria-label="Show strategy {rank}">{rank}</button></td>'
            f'<td class="words">{escape(strategy_words(plan.layout))}</td>{figures}'
            f"<td>{_toml_cell(plan, found.model, rank)}</td></tr>"
        )
    header = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        '<h2 id="strategies">Strategies</h2>\n<div class="scroll"><table>'
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n"
        '<p class="note">MFU counts full attention. A number shows that strategy below.</p>'
    )


def _toml_cell(plan: Plan, model: str, rank: int) -> str:
    """A copyable train.toml, where fastllm-train could take it."""
    try:
        toml = train_toml(plan, model)
    except UserError:
        return ""
    return (
        f'<button class="copy" data-from="toml-{rank}" aria-label="Copy TOML of strategy {rank}">'
        f'Copy TOML</button><pre id="toml-{rank}" hidden>{escape(toml)}</pre>'
    )


def _plan_sections(found: Answer) -> list[str]:
    parts = ['<h2 id="pictures" tabindex="-1">Memory and time</h2>']
    for rank, plan in enumerate(found.plans, start=1):
        figures = (
            ("Memory of each pipeline stage", memory_by_stage(plan)),
            ("Memory against sequence length", memory_by_sequence(plan)),
            ("Step time", step_waterfall(plan)),
            ("Pipeline schedule", pipeline_schedule(plan)),
        )
        drawn = "\n".join(
            f"<figure class=scroll><figcaption>{name}</figcaption>\n{picture}</figure>"
            for name, picture in figures
        )
        parts.append(
            f'<section class="plan" data-rank="{rank}"><p><b>{rank}.</b> '
            f"{escape(strategy_words(plan.layout))}</p>\n{drawn}</section>"
        )
    return parts


def _map(found: Answer) -> str:
    best = found.plans[0].layout
    picture = parallel_map(found.cells, (best.tp, best.pp))
    return (
        '<h2 id="map">TP × PP</h2>\n<figure class="scroll"><figcaption>Tokens per second and '
        "device of the best layout of each TP and PP; the recommended one is framed."
        f"</figcaption>\n{picture}</figure>"
    )


def _rejected(found: Answer) -> str:
    entries = sorted(found.result.rejections.values(), key=lambda entry: -entry.count)
    if not entries:
        return ""
    items = "".join(
        f"<li><b>{entry.count}</b> {escape(entry.reason)}<br>"
        f'<span class="note">e.g. {escape(strategy_words(entry.example))}: '
        f"{escape(entry.detail)}</span></li>"
        for entry in entries
    )
    return (
        f'<h2 id="rejected">Not listed</h2>\n<details><summary>{found.result.shapes:,} layout '
        f"shapes considered, {found.result.priced:,} layouts priced</summary>"
        f"<ul>{items}</ul></details>"
    )


def _assumptions(job: Job) -> str:
    lines = [*assumptions(job), _measured_error(job)]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f'<h2 id="assumptions">Assumptions and measured error</h2>\n<ul>{items}</ul>\n'
        f'<p class="note">fastllm-planner {escape(__version__)}.</p>'
    )


def _measured_error(job: Job) -> str:
    """How far the model was from published runs, and whether this backend was among them."""
    own = {cell.series for cell in shipped_cells() if cell.backend == job.backend.name}
    if own:
        among = f"{len(own)} of the series ran backend {job.backend.name}."
    else:
        among = f"None of them ran backend {job.backend.name}."
    return f"{accuracy_sentence()} {among}"


def _data(found: Answer) -> str:
    """The plan's JSON, for programs that read the page; ``<`` is escaped for the script tag."""
    raw = json.dumps(found.to_json(), sort_keys=True).replace("<", "\\u003c")
    return f'<script type="application/json" id="plan">{raw}</script>'
