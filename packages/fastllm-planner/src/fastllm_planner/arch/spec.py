"""What a model *is*: one frozen description that planner, trainer and converter all read.

Standard library only. ``ArchSpec`` holds every choice that changes a tensor's shape or the
mathematics of the forward pass; ``fastllm_planner.arch.params.iter_params`` turns it into tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

Mlp = Literal["swiglu", "gelu"]
Norm = Literal["rmsnorm", "layernorm"]
Position = Literal["rope", "learned", "alibi"]


class ArchError(ValueError):
    """An architecture that cannot exist (or cannot be expressed); carries a hint for the user."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    ``scaling`` is the Hugging Face ``rope_scaling`` object (``rope_type``, ``factor``, ...) kept
    verbatim, or empty for none. A tuple of pairs, so that the spec stays hashable.
    """

    theta: float = 10_000.0
    scaling: tuple[tuple[str, Any], ...] = ()

    @property
    def scaling_dict(self) -> dict[str, Any]:
        return dict(self.scaling)


@dataclass(frozen=True)
class MoeSpec:
    """Mixture of experts. Every layer from ``first_dense_layers`` on has ``experts`` experts.

    ``ffn_hidden`` is one expert's width; ``shared_ffn_hidden`` is the total width of the
    always-active shared experts (0: none); ``router_bias`` is DeepSeek-V3's per-expert correction.
    """

    experts: int
    active_experts: int
    ffn_hidden: int
    shared_ffn_hidden: int = 0
    first_dense_layers: int = 0
    router_bias: bool = False
    norm_topk: bool = True
    aux_loss_coef: float = 0.0


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434). ``q_lora_rank`` 0: full q."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class ArchSpec:
    """A decoder-only transformer. Sizes in elements; ``head_dim`` need not be hidden/heads.

    Raises ``ArchError`` from ``__post_init__`` for sizes that cannot make a model.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden: int
    vocab: int
    max_seq_len: int
    mlp: Mlp = "swiglu"
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    position: Position = "rope"
    rope: RopeSpec = field(default_factory=RopeSpec)
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None
    norm_head: bool = False
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "max_seq_len")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArchError(f"{name}={value!r} is not a positive integer")
        if self.ffn_hidden < 1 and self.moe is None:
            raise ArchError(f"ffn_hidden={self.ffn_hidden} is not a positive integer")
        if self.heads % self.kv_heads:
            raise ArchError(
                f"kv_heads={self.kv_heads} does not divide {self.heads} heads",
                hint="grouped-query attention needs heads to be a multiple of kv_heads",
            )
        if self.position == "rope" and self.mla is None and self.head_dim % 2:
            raise ArchError(f"head_dim={self.head_dim} is odd: rotary embedding needs an even one")
        if self.moe is not None and not 0 < self.moe.active_experts <= self.moe.experts:
            raise ArchError(
                f"active_experts={self.moe.active_experts} is not between 1 and "
                f"{self.moe.experts} experts"
            )

    @property
    def q_size(self) -> int:
        """Width of the concatenated query heads (a*d)."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the concatenated key (or value) heads (kv*d)."""
        return self.kv_heads * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        """g of the formulas: 3 matrices in a gated MLP, 2 otherwise."""
        return 3 if self.mlp == "swiglu" else 2

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer >= self.moe.first_dense_layers


def as_table(value: object) -> dict[str, Any] | None:
    """A JSON/TOML table as a dict with a type, or None for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def spec_to_dict(spec: ArchSpec) -> dict[str, Any]:
    """A JSON/TOML-ready mapping that ``spec_from_dict`` turns back into an equal spec."""
    from dataclasses import asdict

    raw = asdict(spec)
    raw["rope"] = {"theta": spec.rope.theta, "scaling": spec.rope.scaling_dict}
    return {key: value for key, value in raw.items() if value is not None}


def spec_from_dict(raw: Mapping[str, Any]) -> ArchSpec:
    """Inverse of ``spec_to_dict``. Raises ``ArchError`` naming an unknown key's nearest match."""
    import difflib
    from dataclasses import fields

    known = {f.name for f in fields(ArchSpec)}
    values = dict(raw)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
            )
            raise ArchError(f"unknown architecture key {key!r}", hint=hint)
    try:
        if (rope := as_table(values.get("rope"))) is not None:
            scaling = as_table(rope.get("scaling")) or {}
            values["rope"] = RopeSpec(float(rope.get("theta", 10_000.0)), tuple(scaling.items()))
        if (moe := as_table(values.get("moe"))) is not None:
            values["moe"] = MoeSpec(**moe)
        if (mla := as_table(values.get("mla"))) is not None:
            values["mla"] = MlaSpec(**mla)
        return ArchSpec(**values)
    except TypeError as error:
        raise ArchError(f"incomplete architecture: {error}") from error
