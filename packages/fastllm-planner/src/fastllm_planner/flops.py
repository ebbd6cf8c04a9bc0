"""FLOPs per token, by named convention.

- *model, full*: multiply-adds of the forward and backward pass; attention counted as if every
  token saw the whole sequence (NeMo up to 24.12, Korthikanti et al. arXiv:2205.05198 "model",
  llm-foundry).
- *model, causal*: the same with half the attention scores (Megatron-LM now, Megatron-Bridge).
- *hardware*: model (full) plus the forward passes that recomputation repeats (Narayanan et al.
  arXiv:2104.04473 eq. 3 for ``full``; Korthikanti for ``selective``). FlashAttention's own backward
  recomputation is counted by nobody, here neither.

A multiply-add is 2 FLOPs; the backward pass costs twice the forward. Embedding look-ups cost none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fastllm_planner.arch import ArchSpec

Convention = Literal["full", "causal"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs per token of the whole model, split by what recomputation can repeat.

    ``attention_per_key`` is per token and *per key position*: multiply by the sequence length
    (full convention) or half of it (causal).
    """

    attention_linear: float
    mlp_linear: float
    head: float
    attention_per_key: float

    @property
    def linear(self) -> float:
        """Everything inside the layers that is a weight times an activation."""
        return self.attention_linear + self.mlp_linear


@lru_cache(maxsize=256)
def forward_flops(spec: ArchSpec) -> ForwardFlops:
    """Forward FLOPs per token, the sums that every convention is made of."""
    layers = spec.layers
    return ForwardFlops(
        attention_linear=layers * attention_linear_flops(spec),
        mlp_linear=sum(mlp_flops(spec, layer) for layer in range(layers)),
        head=2.0 * spec.vocab * spec.hidden,
        attention_per_key=layers * 2.0 * attention_key_width(spec),
    )


def attention_linear_flops(spec: ArchSpec) -> float:
    """q, k, v and output projections of one layer, forward FLOPs per token."""
    if spec.mla is None:
        return 2.0 * spec.hidden * (2 * spec.q_size + 2 * spec.kv_size)
    mla, h, a = spec.mla, spec.hidden, spec.heads
    qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    query = mla.q_lora_rank * (h + a * qk) if mla.q_lora_rank else h * a * qk
    latent = h * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    expand = mla.kv_lora_rank * a * (mla.qk_nope_head_dim + mla.v_head_dim)
    return 2.0 * (query + latent + expand + a * mla.v_head_dim * h)


def attention_key_width(spec: ArchSpec) -> float:
    """Width of scores plus width of values: 2*a*d, or a*(d_qk + d_v) for MLA."""
    if spec.mla is None:
        return 2.0 * spec.q_size
    mla = spec.mla
    return float(spec.heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim))


def mlp_flops(spec: ArchSpec, layer: int) -> float:
    """MLP of one layer, forward FLOPs per token (active experts, shared experts and router)."""
    per_width = 2.0 * spec.mlp_matrices * spec.hidden
    if not spec.is_moe_layer(layer):
        return per_width * spec.ffn_hidden
    moe = spec.moe
    assert moe is not None
    width = moe.active_experts * moe.ffn_hidden + moe.shared_ffn_hidden
    return per_width * width + 2.0 * spec.hidden * moe.experts


def _keys(spec: ArchSpec, seq_len: int, convention: Convention) -> float:
    """Key positions per token that the convention counts."""
    if convention == "full":
        return float(seq_len)
    window = spec.sliding_window
    if window is None or window >= seq_len:
        return seq_len / 2
    # Positions below the window see half of it on average, the others all of it.
    return window - window * window / (2 * seq_len)


def model_flops_per_token(spec: ArchSpec, seq_len: int, convention: Convention = "full") -> float:
    """Forward and backward FLOPs per token that the mathematics needs."""
    f = forward_flops(spec)
    keys = _keys(spec, seq_len, convention)
    return 3.0 * (f.linear + f.head + f.attention_per_key * keys)


def hardware_flops_per_token(spec: ArchSpec, seq_len: int, recompute: Recompute) -> float:
    """Model FLOPs (full attention) plus what ``recompute`` repeats.

    ``full`` repeats the forward pass of every layer, not the head; ``selective`` repeats the
    attention scores only.
    """
    f = forward_flops(spec)
    scores = f.attention_per_key * seq_len
    repeated = {"none": 0.0, "selective": scores, "full": f.linear + scores}[recompute]
    return model_flops_per_token(spec, seq_len) + repeated
