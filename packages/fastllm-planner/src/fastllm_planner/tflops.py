"""The after-training calculator: TFLOPs per device of a finished run, by named convention.

The classic form is 8·N·tokens/(t·devices): 2 forward, 4 backward and 2 recomputation FLOPs per
parameter and token, attention left out (arXiv:2104.04473 §5.1 without its small terms). The named
conventions are those of ``fastllm_planner.flops``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastllm_planner.arch import ArchSpec
from fastllm_planner.flops import hardware_flops_per_token, model_flops_per_token

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Measured:
    """One step of a run: sequences, tokens per sequence, seconds, devices."""

    global_batch: int
    seq_len: int
    iter_time: float
    devices: int

    @property
    def tokens(self) -> int:
        return self.global_batch * self.seq_len

    @property
    def tokens_per_s_per_device(self) -> float:
        return self.tokens / self.iter_time / self.devices

    def tflops(self, flops_per_token: float) -> float:
        """TFLOP/s per device when a token costs ``flops_per_token``."""
        return flops_per_token * self.tokens_per_s_per_device / 1e12


@dataclass(frozen=True)
class Rate:
    """One convention: its name, what it counts, FLOPs per token and TFLOP/s per device."""

    key: str
    name: str
    formula: str
    flops_per_token: float
    tflops: float


def rates(
    measured: Measured, params: float, spec: ArchSpec | None, recompute: Recompute
) -> list[Rate]:
    """The classic form and 6·N always; the conventions that count attention need ``spec``."""
    counted = [
        ("classic", "classic", "8·N, full recomputation, no attention", 8.0 * params),
        ("params_only", "parameters only", "6·N, no attention", 6.0 * params),
    ]
    if spec is not None:
        length = measured.seq_len
        full = model_flops_per_token(spec, length, "full")
        causal = model_flops_per_token(spec, length, "causal")
        hardware = hardware_flops_per_token(spec, length, recompute)
        again = {
            "none": "nothing recomputed",
            "selective": "attention scores recomputed",
            "full": "every layer recomputed",
        }[recompute]
        counted += [
            ("model_full", "model, full", "matmuls and whole attention", full),
            ("model_causal", "model, causal", "matmuls and half the attention", causal),
            ("hardware", "hardware", f"model, full; {again}", hardware),
        ]
    return [Rate(*row, measured.tflops(row[3])) for row in counted]
