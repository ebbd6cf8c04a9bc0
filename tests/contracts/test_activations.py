"""The planner's activation bytes of its ``fastllm`` backend against what the trainer's layers keep.

Counted on the CPU: the storages that autograd saves between forward and backward, parameters left
out. The fused operators keep the same on every device.
"""

import pytest

torch = pytest.importorskip("torch", reason="the trainer needs torch")
decoder = pytest.importorskip("fastllm_train.models.decoder", reason="needs fastllm-train")
pytest.importorskip("fastllm_core", reason="the fused operators need the native core")

from fastllm_planner.arch import ArchSpec  # noqa: E402
from fastllm_planner.backends import backend  # noqa: E402
from fastllm_planner.layout import Layout  # noqa: E402
from fastllm_planner.memory import saved_bytes_per_token  # noqa: E402
from fastllm_train.models.kernels import kernels_of  # noqa: E402
from fastllm_train.speed import SpeedConfig  # noqa: E402

BATCH, SEQ = 2, 128
SPEC = ArchSpec("llama", 1, 256, 4, 2, 64, 704, 512, SEQ)


def kept_bytes(model, run) -> int:
    """Bytes of distinct storages that the backward pass of ``run()`` would read."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor):
        alive.append(tensor)  # a freed storage's address could come back as another's
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def layer_bytes_per_token(layers: int, recompute: str) -> float:
    """Bytes per token that one more layer keeps."""
    from dataclasses import replace

    def total(count: int) -> int:
        torch.manual_seed(0)
        spec = replace(SPEC, layers=count)
        kernels = kernels_of(SpeedConfig().kernels)  # what a run uses unless told otherwise
        model = decoder.Decoder(spec, recompute=recompute, kernels=kernels)
        model = model.to(torch.bfloat16).train()
        tokens = torch.randint(0, spec.vocab, (BATCH, SEQ))
        positions = torch.arange(SEQ).expand(BATCH, SEQ)
        return kept_bytes(model, lambda: model.model(tokens, positions))

    return (total(layers + 1) - total(layers)) / (BATCH * SEQ)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_layer_keeps_no_more_than_the_planner_says(recompute: str) -> None:
    """Within 5 % above, and no more than a tenth below."""
    layout = Layout(micro_batch=BATCH, seq_len=SEQ, recompute=recompute)  # type: ignore[arg-type]
    planned = saved_bytes_per_token(SPEC, layout, backend("fastllm"))
    kept = layer_bytes_per_token(2, recompute)
    assert kept <= 1.05 * planned
    assert planned <= 1.10 * kept
