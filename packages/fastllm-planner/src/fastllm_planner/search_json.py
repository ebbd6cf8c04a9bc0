"""The JSON object of ``plan`` and ``estimate``: ``schema`` 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastllm_planner.plan import SCHEMA, Job, Plan, job_to_json, layout_to_json, plan_to_json
from fastllm_planner.search import SearchResult


def result_to_json(
    job: Job,
    result: SearchResult,
    plans: Sequence[Plan],
    verdict: str,
    explain: bool,
    trainer: str = "",
) -> dict[str, Any]:
    """``plans`` fastest first; ``rejected`` only where asked for; ``closest`` when nothing fits;
    ``trainer`` where fastllm-train cannot run the first plan: why, and what it can.
    """
    out: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": verdict,
        "fits": bool(plans),
        "job": job_to_json(job),
        "plans": [plan_to_json(plan) for plan in plans],
        "search": {"shapes": result.shapes, "priced": result.priced},
    }
    if trainer:
        out["trainer"] = trainer
    if not plans and result.closest is not None:
        closest = result.closest
        out["closest"] = {
            "layout": layout_to_json(closest.layout),
            "required_bytes": closest.peak,
            "host_bytes": closest.host,
            "nvme_bytes": closest.nvme,
        }
    if explain:
        out["rejected"] = [
            {
                "reason": entry.reason,
                "count": entry.count,
                "example": layout_to_json(entry.example),
                "detail": entry.detail,
            }
            for entry in result.rejections.values()
        ]
    return out


def estimate_to_json(plan: Plan, verdict: str, reasons: Sequence[str]) -> dict[str, Any]:
    """One given layout; ``reasons`` say why it cannot run, if it cannot."""
    return {
        "schema": SCHEMA,
        "verdict": verdict,
        "fits": plan.fits and not reasons,
        "reasons": list(reasons),
        "job": job_to_json(plan.job),
        "plan": plan_to_json(plan),
    }
