"""A plan as one self-contained HTML page: inline SVG, a little script, nothing from the network."""

from fastllm_planner.report.page import Answer, answer, render_page

__all__ = ["Answer", "answer", "render_page"]
