"""A decoder-only transformer over ``ArchSpec``; module names give the canonical parameter names.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastllm_planner.arch import ArchSpec, iter_params
from fastllm_train.models.attention import Attention, Positions, positions
from fastllm_train.models.attention_core import Core, attend, fused_attend
from fastllm_train.models.kernels import FUSED, TORCH, Kernels
from fastllm_train.models.mlp import Gelu, MixtureOfExperts, SwiGLU, build_mlp
from fastllm_train.models.norm import build_norm
from fastllm_train.models.not_kept import not_kept
from fastllm_train.models.supported import check_supported
from fastllm_train.models.z_loss import loss_with_z


class Loss(NamedTuple):
    """Sums over a micro-batch's weighted tokens, fp32 scalars in nats.

    ``objective`` is what is minimised: the cross entropy plus the weighted auxiliary losses.
    ``cross_entropy`` carries no gradient; it is what is reported.
    """

    objective: Tensor
    cross_entropy: Tensor


class Block(nn.Module):
    """Pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)). [B, S, H] → [B, S, H]."""

    recompute_elementwise = False

    def __init__(
        self, spec: ArchSpec, layer: int, *, recompute_core: bool, kernels: Kernels, core: Core
    ) -> None:
        super().__init__()
        self.input_layernorm = build_norm(spec, spec.hidden, kernels)
        self.self_attn = Attention(
            spec, layer, recompute_core=recompute_core, kernels=kernels, core=core
        )
        self.post_attention_layernorm = build_norm(spec, spec.hidden, kernels)
        self.mlp = build_mlp(spec, layer, kernels)

    def forward(self, x: Tensor, where: Positions) -> Tensor:
        normed = self.input_layernorm(x)
        if not self.recompute_elementwise or torch.compiler.is_compiling():
            mixed = self.self_attn(normed, where)
            normed, x = self.post_attention_layernorm(mixed, x)
            return x + self.mlp(normed)
        with not_kept(normed, lambda: self.input_layernorm(x)):
            mixed = self.self_attn(normed, where)
        normed, total = self.post_attention_layernorm(mixed, x)
        with not_kept(normed, lambda: self.post_attention_layernorm(total)):
            return total + self.mlp(normed)


def _itself(x: Tensor) -> Tensor:
    return x


class Trunk(nn.Module):
    """Embedding, layers, final norm: tokens [B, S] → [B, S, H].

    A pipeline stage holds some of ``layers`` (keyed by their index in the whole model), and the
    embedding and the norm only at the ends.
    """

    def __init__(
        self, spec: ArchSpec, *, recompute: str, kernels: Kernels, core: Core, documents: bool
    ) -> None:
        super().__init__()
        check_supported(spec)
        self.spec = spec
        self.documents = documents
        self._tables = core in (attend, fused_attend)
        self._compiled = False
        self.recompute_blocks = recompute == "full"
        # Over how many ranks the sequence is cut; the whole sequence's positions from a part's.
        self.context_ranks = 1
        self.whole_positions: Callable[[Tensor], Tensor] = _itself
        self.embed_tokens: nn.Module = nn.Embedding(spec.vocab, spec.hidden)
        if spec.position == "learned":
            self.embed_positions: nn.Module = nn.Embedding(spec.max_seq_len, spec.hidden)
        self.layers = nn.ModuleDict(
            {
                str(layer): Block(
                    spec,
                    layer,
                    recompute_core=recompute == "selective",
                    kernels=kernels,
                    core=core,
                )
                for layer in range(spec.layers)
            }
        )
        self.norm = build_norm(spec, spec.hidden, kernels)

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        return self.norm(self.run_layers(self.embed(tokens, position_ids), position_ids))

    def compile_layers(self, backend: str = "inductor") -> None:
        """Each layer becomes one graph of torch.compile, without graph breaks, at its first call.
        To be called with parallel layouts in place: their collectives are part of it."""
        self._compiled = True
        for layer in self.layers.values():
            layer.compile(fullgraph=True, backend=backend)

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """[B, S] → [B, S, H]."""
        x = self.embed_tokens(tokens)
        if self.spec.position == "learned":
            x = x + self.embed_positions(position_ids)
        return x

    def run_layers(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """The layers held here."""
        documents = self.whole_positions(position_ids) if self.documents else None
        where = positions(
            self.spec,
            position_ids,
            x.dtype,
            self.context_ranks,
            documents,
            tables=self._tables,
            dense=self._compiled,
        )
        for layer in self.layers.values():
            if self.recompute_blocks and self.training:
                x = checkpoint(layer, x, where, use_reentrant=False)
            else:
                x = layer(x, where)
        return x


class LmHead(nn.Linear):
    """Hidden states [B, S, H] → logits [B, S, V]; or, with labels, their loss without logits."""

    def __init__(self, spec: ArchSpec, kernels: Kernels = TORCH) -> None:
        super().__init__(spec.hidden, spec.vocab, bias=False)
        self.kernels = kernels

    def rows(self) -> Tensor:
        """[V, H]: what hidden states are multiplied with."""
        return self.weight

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        share: Tensor | None = None,
        first: int = 0,
        group: Any = None,
    ) -> Tensor:
        """With ``labels`` and ``share`` [B, S]: ``Kernels.head_loss``."""
        if labels is None or share is None:
            return F.linear(hidden, self.rows())
        flat = (hidden.flatten(0, 1), self.rows(), labels.flatten(), share.flatten())
        return self.kernels.head_loss(*flat, first, group)


class NormHead(LmHead):
    """A head whose rows have length one when they are used (Baichuan2, arXiv:2309.10305, 2.4)."""

    def rows(self) -> Tensor:
        return F.normalize(self.weight)


class Decoder(nn.Module):
    """The model with its language-model head. ``documents``: a sequence holds several, each
    beginning at position 0, and attention stays within each. ``recompute_elementwise``: outputs of
    norms and activations are made again in the backward pass. ``core``: by default what belongs to
    the ``kernels``."""

    def __init__(
        self,
        spec: ArchSpec,
        *,
        recompute: str = "none",
        recompute_elementwise: bool = False,
        kernels: Kernels = TORCH,
        core: Core | None = None,
        documents: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        if core is None:
            core = fused_attend if kernels is FUSED else attend
        self.model = Trunk(
            spec, recompute=recompute, kernels=kernels, core=core, documents=documents
        )
        self.lm_head = (NormHead if spec.norm_head else LmHead)(spec, kernels)
        if spec.tied_embeddings:
            assert isinstance(self.model.embed_tokens, nn.Embedding)
            self.lm_head.weight = self.model.embed_tokens.weight
        # Blocks that are recomputed as a whole keep nothing anyway.
        if recompute_elementwise and recompute != "full":
            for module in self.modules():
                if isinstance(module, Block | SwiGLU | Gelu):
                    module.recompute_elementwise = True

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [B, S, V] in the model's dtype, for int64 [B, S] inputs."""
        return self.lm_head(self.model(tokens, position_ids))


class TrainingModel(nn.Module):
    """A decoder and its loss as one module, with the decoder's parameter names.

    ``first_row`` and ``vocabulary_group``: the part of the vocabulary that the head gives.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.spec = decoder.spec
        self.model = decoder.model
        self.lm_head: nn.Module = decoder.lm_head
        self.first_row = 0
        self.vocabulary_group: Any = None
        self.z_loss = 0.0  # its coefficient

    def forward(
        self, tokens: Tensor, position_ids: Tensor, labels: Tensor, loss_mask: Tensor
    ) -> Loss:
        """Weighted sums over the tokens; the caller divides by the global batch's weight."""
        hidden = self.model(tokens, position_ids)
        objective, cross_entropy = self.head_loss(hidden, labels, loss_mask)
        balance = self.balance_loss(loss_mask)
        if balance is not None:
            objective = objective + balance
        return Loss(objective, cross_entropy.detach())

    def head_loss(self, hidden: Tensor, labels: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Of the final hidden states [B, S, H], labels and mask [B, S]: the objective, with the
        z-loss, and Σ mask * cross entropy."""
        where = (self.first_row, self.vocabulary_group)
        if not self.z_loss:
            cross_entropy = self.lm_head(hidden, labels, loss_mask, *where)
            return cross_entropy, cross_entropy
        logits = self.lm_head(hidden).flatten(0, 1)
        return loss_with_z(logits, labels.flatten(), loss_mask.flatten(), self.z_loss, *where)

    def balance_loss(self, loss_mask: Tensor) -> Tensor | None:
        """The experts' weighted loss: coefficient * Σ mask * mean over the layers with experts, of
        which this module may hold some. None without experts here."""
        moe = self.spec.moe
        if moe is None or not moe.aux_loss_coef:
            return None
        losses = [
            module.balance_loss
            for module in self.modules()
            if isinstance(module, MixtureOfExperts) and module.balance_loss is not None
        ]
        if not losses:
            return None
        in_all = sum(self.spec.is_moe_layer(layer) for layer in range(self.spec.layers))
        # The mask's sum is exact; a product with it in fp32 first would not add up over parts.
        return torch.stack(losses).sum() * (moe.aux_loss_coef / in_all) * loss_mask.sum()


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
