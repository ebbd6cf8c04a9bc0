"""A decoder-only transformer over ``ArchSpec``; module names give the canonical parameter names.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastllm_planner.arch import ArchSpec, iter_params
from fastllm_train.models.attention import Attention
from fastllm_train.models.mlp import SwiGLU
from fastllm_train.models.norm import build_norm
from fastllm_train.models.rope import rotation
from fastllm_train.models.supported import check_supported


class Block(nn.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)). [B, S, H] → [B, S, H]."""

    def __init__(self, spec: ArchSpec, *, recompute_core: bool) -> None:
        super().__init__()
        self.input_layernorm = build_norm(spec, spec.hidden)
        self.self_attn = Attention(spec, recompute_core=recompute_core)
        self.post_attention_layernorm = build_norm(spec, spec.hidden)
        self.mlp = SwiGLU(spec, spec.ffn_hidden)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers, final norm: tokens [B, S] → [B, S, H]."""

    def __init__(self, spec: ArchSpec, *, recompute: str) -> None:
        super().__init__()
        check_supported(spec)
        self.spec = spec
        self.recompute_blocks = recompute == "full"
        self.embed_tokens = nn.Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(
            Block(spec, recompute_core=recompute == "selective") for _ in range(spec.layers)
        )
        self.norm = build_norm(spec, spec.hidden)

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        angles = rotation(self.spec.rope, self.spec.head_dim, position_ids)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            if self.recompute_blocks and self.training:
                x = checkpoint(layer, x, angles, use_reentrant=False)
            else:
                x = layer(x, angles)
        return self.norm(x)


class Decoder(nn.Module):
    """The model with its language-model head."""

    def __init__(self, spec: ArchSpec, *, recompute: str = "none") -> None:
        super().__init__()
        self.model = Trunk(spec, recompute=recompute)
        self.lm_head = nn.Linear(spec.hidden, spec.vocab, bias=False)
        if spec.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """Without ``labels``: logits [B, S, V]. With them: the weighted **sum** of the tokens'
        cross entropy, fp32 scalar in nats; the caller divides by the global batch's weight."""
        logits = self.lm_head(self.model(tokens, position_ids))
        if labels is None:
            return logits
        return summed_cross_entropy(logits, labels, loss_mask)


def summed_cross_entropy(logits: Tensor, labels: Tensor, loss_mask: Tensor | None) -> Tensor:
    """Σ mask * -log softmax(logits)[label] in fp32; logits [B, S, V], labels and mask [B, S]."""
    flat = logits.flatten(0, 1).float()
    if loss_mask is None:
        return F.cross_entropy(flat, labels.flatten(), reduction="sum")
    losses = F.cross_entropy(flat, labels.flatten(), reduction="none")
    return torch.dot(losses, loss_mask.flatten().to(losses.dtype))


def assert_parameters(model: nn.Module, spec: ArchSpec) -> None:
    """``named_parameters()`` and ``iter_params(spec)`` list the same names and shapes.

    A difference is a defect of ours, not of the input: ``AssertionError`` lists the first few.
    """
    wanted = {p.name: p.shape for p in iter_params(spec) if p.tied_to is None}
    found = {
        name: tuple(getattr(param, "ds_shape", param.shape))
        for name, param in model.named_parameters()
    }
    if wanted != found:
        names = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        rows = [f"{n}: arch {wanted.get(n)}, model {found.get(n)}" for n in names[:5]]
        raise AssertionError(f"model and architecture differ in {len(names)}: " + "; ".join(rows))
