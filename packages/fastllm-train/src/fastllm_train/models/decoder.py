"""A decoder-only transformer over ``ArchSpec``; module names give the canonical parameter names.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastllm_planner.arch import ArchSpec, iter_params
from fastllm_train.models.attention import Attention, Positions, positions
from fastllm_train.models.mlp import MixtureOfExperts, build_mlp
from fastllm_train.models.norm import build_norm, widened
from fastllm_train.models.supported import check_supported

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]


class Loss(NamedTuple):
    """Sums over a micro-batch's weighted tokens, fp32 scalars in nats.

    ``objective`` is what is minimised: the cross entropy plus the weighted auxiliary losses.
    ``cross_entropy`` carries no gradient; it is what is reported.
    """

    objective: Tensor
    cross_entropy: Tensor


class Block(nn.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)). [B, S, H] → [B, S, H]."""

    def __init__(self, spec: ArchSpec, layer: int, *, recompute_core: bool) -> None:
        super().__init__()
        self.input_layernorm = build_norm(spec, spec.hidden)
        self.self_attn = Attention(spec, layer, recompute_core=recompute_core)
        self.post_attention_layernorm = build_norm(spec, spec.hidden)
        self.mlp = build_mlp(spec, layer)

    def forward(self, x: Tensor, where: Positions) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), where)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Embedding, layers, final norm: tokens [B, S] → [B, S, H]."""

    def __init__(self, spec: ArchSpec, *, recompute: str) -> None:
        super().__init__()
        check_supported(spec)
        self.spec = spec
        self.recompute_blocks = recompute == "full"
        self.embed_tokens: nn.Module = nn.Embedding(spec.vocab, spec.hidden)
        if spec.position == "learned":
            self.embed_positions: nn.Module = nn.Embedding(spec.max_seq_len, spec.hidden)
        self.layers = nn.ModuleList(
            Block(spec, layer, recompute_core=recompute == "selective")
            for layer in range(spec.layers)
        )
        self.norm = build_norm(spec, spec.hidden)

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        if self.spec.position == "learned":
            x = x + self.embed_positions(position_ids)
        where = positions(self.spec, position_ids, x.dtype)
        for layer in self.layers:
            if self.recompute_blocks and self.training:
                x = checkpoint(layer, x, where, use_reentrant=False)
            else:
                x = layer(x, where)
        return self.norm(x)


class NormHead(nn.Linear):
    """A head whose rows have length one when they are used (Baichuan2, arXiv:2309.10305, 2.4)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.normalize(self.weight))


class Decoder(nn.Module):
    """The model with its language-model head."""

    def __init__(self, spec: ArchSpec, *, recompute: str = "none") -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec, recompute=recompute)
        head = NormHead if spec.norm_head else nn.Linear
        self.lm_head = head(spec.hidden, spec.vocab, bias=False)
        if spec.tied_embeddings:
            embedding = self.model.embed_tokens
            assert isinstance(embedding, nn.Embedding)
            self.lm_head.weight = embedding.weight

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [B, S, V] in the model's dtype, for int64 [B, S] inputs."""
        return self.lm_head(self.model(tokens, position_ids))


class TrainingModel(nn.Module):
    """A decoder and its loss as one module, with the decoder's parameter names."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.spec = decoder.spec
        self.model = decoder.model
        self.lm_head = decoder.lm_head
        self.cross_entropy: CrossEntropy = summed_cross_entropy

    def forward(
        self, tokens: Tensor, position_ids: Tensor, labels: Tensor, loss_mask: Tensor
    ) -> Loss:
        """Weighted sums over the tokens; the caller divides by the global batch's weight."""
        logits = self.lm_head(self.model(tokens, position_ids))
        cross_entropy = self.cross_entropy(logits, labels, loss_mask)
        objective = cross_entropy
        if self.spec.moe is not None and self.spec.moe.aux_loss_coef:
            coefficient = self.spec.moe.aux_loss_coef
            objective = objective + coefficient * loss_mask.sum() * self._balance_loss()
        return Loss(objective, cross_entropy.detach())

    def _balance_loss(self) -> Tensor:
        """Mean over the layers with experts."""
        losses = [
            module.balance_loss
            for module in self.modules()
            if isinstance(module, MixtureOfExperts) and module.balance_loss is not None
        ]
        return torch.stack(losses).mean()


def summed_cross_entropy(logits: Tensor, labels: Tensor, loss_mask: Tensor) -> Tensor:
    """Σ mask * -log softmax(logits)[label] in fp32; logits [B, S, V], labels and mask [B, S]."""
    losses = F.cross_entropy(widened(logits.flatten(0, 1)), labels.flatten(), reduction="none")
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
