"""A stage's memory at its peak, by part: what the tables print and the bars stack."""

from __future__ import annotations

from fastllm_planner.memory import StageMemory

PARTS = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("activations", "activations"),
    ("transient", "logits, workspace"),
    ("gathered", "gathered layers"),
    ("runtime", "buffers, runtime"),
)


def memory_parts(stage: StageMemory) -> dict[str, float]:
    """Bytes by part at the moment of the peak; they add up to ``stage.required``.

    Parts that are not there at that moment are 0: activations in the optimizer step, and gradients
    that a stack allocates only while the activations go.
    """
    parts = dict.fromkeys((key for key, _ in PARTS), 0.0)
    parts["weights"], parts["optimizer"] = stage.weights, stage.optimizer
    if stage.peak_in != "backward":
        parts["gradients"] = stage.step_gradients
        parts["transient"] = stage.optimizer_temporaries
    else:
        parts["gathered"] = stage.gathered_layers
        parts |= _backward(stage)
    # Communication buffers, the context, and cache that the allocator cannot give back.
    parts["runtime"] = stage.required - sum(parts.values())
    return parts


def _backward(stage: StageMemory) -> dict[str, float]:
    """What ``StageMemory.backward_peak`` is made of."""
    if not stage.lazy_gradients:
        return {
            "gradients": stage.gradients,
            "activations": stage.activations,
            "transient": max(stage.logits, stage.workspace),
        }
    later = max(stage.activations, stage.gradients) + stage.workspace
    if stage.activations + stage.logits >= later:
        return {"activations": stage.activations, "transient": stage.logits}
    if stage.activations >= stage.gradients:
        return {"activations": stage.activations, "transient": stage.workspace}
    return {"gradients": stage.gradients, "transient": stage.workspace}
