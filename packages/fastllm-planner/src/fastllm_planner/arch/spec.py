"""What a model *is*: one frozen description that planner, trainer and converter all read.

Standard library only. ``ArchSpec`` holds every choice that changes a tensor's shape or the
mathematics of the forward pass; ``fastllm_planner.arch.params.iter_params`` turns it into tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, cast, get_args

Mlp = Literal["swiglu", "gelu"]
Norm = Literal["rmsnorm", "layernorm"]
Position = Literal["rope", "learned", "alibi"]
Scoring = Literal["softmax", "sigmoid"]

MAX_LAYERS = 10_000
MAX_FLOAT = 1e300


class ArchError(ValueError):
    """An architecture that cannot exist (or cannot be expressed); carries a hint for the user."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    ``scaling`` is the Hugging Face ``rope_scaling`` object (``rope_type``, ``factor``, ...) kept
    verbatim, or empty for none. A tuple of pairs, so that the spec stays hashable, in the order of
    their keys, so that equal settings are equal specs.
    """

    theta: float = 10_000.0
    scaling: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", tuple(sorted(self.scaling, key=lambda kv: kv[0])))

    @classmethod
    def from_table(cls, theta: object, scaling: Mapping[str, Any]) -> RopeSpec:
        """From parsed JSON or TOML; lists become tuples. Raises ``ArchError`` for other shapes."""
        if not is_number(theta) or theta <= 0:
            raise ArchError(f"rope theta {theta!r} is not a positive number")
        frozen: list[tuple[str, Any]] = []
        for key, value in sorted(scaling.items()):
            is_list = isinstance(value, list)
            items = tuple(cast("list[object]", value)) if is_list else (value,)
            kinds = (str, bool, int, float, type(None))
            if not all(isinstance(item, kinds) for item in items):
                raise ArchError(f"rope scaling {key!r} is neither a number, a string nor a list")
            if not all(is_number(item) for item in items if type(item) in (int, float)):
                raise ArchError(f"rope scaling {key!r} holds a number out of range")
            frozen.append((str(key), items if is_list else value))
        return cls(float(theta), tuple(frozen))

    @property
    def scaling_dict(self) -> dict[str, Any]:
        return {
            k: list(cast("tuple[object, ...]", v)) if isinstance(v, tuple) else v
            for k, v in self.scaling
        }


@dataclass(frozen=True)
class MoeSpec:
    """Mixture of experts. Every layer from ``first_dense_layers`` on has ``experts`` experts.

    ``ffn_hidden`` is one expert's width; ``shared_ffn_hidden`` is the total width of the
    always-active shared experts (0: none); ``router_bias`` is DeepSeek-V3's per-expert correction.
    ``scoring``, ``groups``, ``active_groups`` and ``routed_scaling`` are its routing: affinities,
    experts chosen within the best groups, a factor on the routed output (arXiv:2412.19437 §2.1).
    """

    experts: int
    active_experts: int
    ffn_hidden: int
    shared_ffn_hidden: int = 0
    first_dense_layers: int = 0
    router_bias: bool = False
    norm_topk: bool = True
    aux_loss_coef: float = 0.0
    scoring: Scoring = "softmax"
    groups: int = 1
    active_groups: int = 1
    routed_scaling: float = 1.0

    def __post_init__(self) -> None:
        for name in ("experts", "active_experts", "ffn_hidden", "groups", "active_groups"):
            check_size(f"moe.{name}", getattr(self, name))
        for name in ("shared_ffn_hidden", "first_dense_layers"):
            check_size(f"moe.{name}", getattr(self, name), least=0)
        for name in ("router_bias", "norm_topk"):
            _check_flag(f"moe.{name}", getattr(self, name))
        for name in ("aux_loss_coef", "routed_scaling"):
            if not is_number(getattr(self, name)):
                raise ArchError(f"moe.{name}={getattr(self, name)!r} is not a number")
        _check_choice("moe.scoring", self.scoring, get_args(Scoring))
        if self.active_experts > self.experts:
            raise ArchError(
                f"active_experts={self.active_experts} is not between 1 and {self.experts} experts"
            )
        if self.experts % self.groups or self.active_groups > self.groups:
            raise ArchError(
                f"{self.experts} experts do not make {self.groups} groups "
                f"({self.active_groups} active)"
            )


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434). ``q_lora_rank`` 0: full q."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def __post_init__(self) -> None:
        check_size("mla.q_lora_rank", self.q_lora_rank, least=0)
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            check_size(f"mla.{name}", getattr(self, name))


@dataclass(frozen=True)
class ArchSpec:
    """A decoder-only transformer. Sizes in elements; ``head_dim`` need not be hidden/heads.

    ``sliding_window``: keys that a token sees, from layer ``full_attention_layers`` on (the layers
    before it attend to everything). ``norm_head``: Baichuan2's head, whose rows are normalised at
    run time.

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
    full_attention_layers: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "max_seq_len"):
            check_size(name, getattr(self, name))
        check_size("layers", self.layers, most=MAX_LAYERS)
        check_size("ffn_hidden", self.ffn_hidden, least=0 if self.moe else 1)
        check_size("full_attention_layers", self.full_attention_layers, least=0)
        self._check_kinds()
        if self.heads % self.kv_heads:
            raise ArchError(
                f"kv_heads={self.kv_heads} does not divide {self.heads} heads",
                hint="grouped-query attention needs heads to be a multiple of kv_heads",
            )
        if self.position == "rope" and self.mla is None and self.head_dim % 2:
            raise ArchError(f"head_dim={self.head_dim} is odd: rotary embedding needs an even one")

    def _check_kinds(self) -> None:
        """Types that TOML or JSON may get wrong; sizes are checked before."""
        _check_choice("mlp", self.mlp, get_args(Mlp))
        _check_choice("norm", self.norm, get_args(Norm))
        _check_choice("position", self.position, get_args(Position))
        flags = ("qkv_bias", "attention_out_bias", "mlp_bias", "qk_norm", "tied_embeddings")
        for name in (*flags, "norm_head"):
            _check_flag(name, getattr(self, name))
        for name in ("norm_eps", "init_std"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ArchError(f"{name}={value!r} is not a number of at least 0")
        if self.sliding_window is not None:
            check_size("sliding_window", self.sliding_window)
        for name in ("bos_token_id", "eos_token_id"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name), least=0)
        for name, kind in (("rope", RopeSpec), ("moe", MoeSpec | None), ("mla", MlaSpec | None)):
            if not isinstance(getattr(self, name), kind):
                raise ArchError(f"{name} is not a table")
        if not isinstance(cast(object, self.family), str):
            raise ArchError(f"family={self.family!r} is not a name")

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


def is_number(value: object) -> TypeGuard[float]:
    """A finite int or float that a float can hold (JSON admits NaN, Infinity and huge integers)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -MAX_FLOAT <= value <= MAX_FLOAT


def check_size(name: str, value: object, *, least: int = 1, most: int = 2**40) -> None:
    """Raise ``ArchError`` unless ``value`` is an integer from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least else "an integer of at least 0"
        raise ArchError(f"{name}={value!r} is not {wanted}")
    if value > most:
        raise ArchError(f"{name}={value} is beyond any model (at most {most})")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ArchError(f"{name}={value!r} is neither true nor false")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArchError(f"{name}={value!r} is unknown", hint=f"one of: {', '.join(choices)}")


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
            values["rope"] = RopeSpec.from_table(rope.get("theta", 10_000.0), scaling)
        if (moe := as_table(values.get("moe"))) is not None:
            values["moe"] = MoeSpec(**moe)
        if (mla := as_table(values.get("mla"))) is not None:
            values["mla"] = MlaSpec(**mla)
        return ArchSpec(**values)
    except TypeError as error:
        raise ArchError(f"incomplete architecture: {error}") from error
