"""Options of Megatron-LM and Megatron-DeepSpeed → our config, and what has no counterpart."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fastllm_train.errors import UserError
from fastllm_train.migrate.shell_script import Command

DEFAULT_DIVISIBLE_BY = 128  # --make-vocab-size-divisible-by
DEFAULT_EVAL_ITERS = 100
GPT2_VOCAB = 50257
LR_STYLES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "inverse-square-root": "inverse-sqrt",
}
FP16_OPTIONS = {
    "initial-loss-scale": "loss_scale",
    "loss-scale-window": "loss_scale_window",
    "hysteresis": "loss_scale_hysteresis",
    "min-loss-scale": "min_loss_scale",
}


@dataclass
class Migration:
    """``table``: a config; ``notes``: one line for each option that means something else here, or
    nothing; ``ignored``: names of those that say how Megatron runs, not what it computes."""

    table: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def set(self, name: str, value: Any) -> None:
        *path, key = name.split(".")
        table = self.table
        for part in path:
            table = table.setdefault(part, {})
        table[key] = value

    def get(self, name: str, default: Any = None) -> Any:
        value: Any = self.table
        for part in name.split("."):
            value = value.get(part, {}) if isinstance(value, dict) else {}
        return default if value == {} else value


def migrate(command: Command, *, vocab: int | None = None) -> Migration:
    """The config of a training command. ``vocab``: entries of the tokenizer, where no option says.

    ``UserError`` when an option that a model cannot do without is missing or unreadable.
    """
    tables = tomllib.loads(
        files("fastllm_train.migrate").joinpath("megatron.toml").read_text(encoding="utf-8")
    )
    options = read_options(command.arguments)
    found = Migration()
    ignored = set(tables["ignored"]["options"])
    known = set(tables["derived"]["options"]) | ignored
    for name, values in options.items():
        kind = next((k for k in ("int", "float", "str", "flag") if name in tables[k]), None)
        if kind is not None and tables[kind][name]:
            found.set(tables[kind][name], _value(name, values, kind))
        elif name not in known or kind is not None:
            found.notes.append(f"--{' '.join([name, *values])}: has no counterpart")
        elif name in ignored:
            found.ignored.append(f"--{name}")
    for step in (
        _model, _vocabulary, _experts, _layout, _schedule, _data, _precision, _validation, _running,
    ):  # fmt: skip
        step(found, options, command, vocab)
    return found


def read_options(words: Sequence[str]) -> dict[str, list[str]]:
    """``--name value …`` by name. The last one of a name counts."""
    options: dict[str, list[str]] = {}
    name: str | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name] = [value] if equals else []
        elif name is not None:
            options[name].append(word)
    return options


Options = dict[str, list[str]]


def _value(name: str, values: list[str], kind: str) -> Any:
    if kind == "flag":
        return True
    if not values or values[0].startswith("$"):
        what = values[0] if values else "nothing"
        raise UserError(
            f"--{name} is given {what}, which the script does not set",
            hint="set it in a copy of the script",
        )
    if kind == "str":
        return values[0]
    try:
        return int(values[0].replace("_", "")) if kind == "int" else float(values[0])
    except ValueError as error:
        raise UserError(f"--{name} {values[0]} is not a number") from error


def _number(options: Options, *names: str) -> float | None:
    for name in names:
        if name in options:
            return _value(name, options[name], "float")
    return None


def _model(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    del command, vocab
    for name in ("num-layers", "hidden-size", "num-attention-heads"):
        if name not in options:
            raise UserError(f"--{name} is missing", hint="give the whole launch script")
    arch = found.table["model"]["arch"]
    gated = "swiglu" in options
    rotary = "use-rotary-position-embeddings" in options or (
        options.get("position-embedding-type") == ["rope"]
    )
    rms = options.get("normalization", ["layernorm"])[0].lower() == "rmsnorm"
    arch["family"] = "llama" if gated and rms and rotary else "gpt2"
    arch["mlp"] = "swiglu" if gated else "gelu"
    arch["norm"] = "rmsnorm" if rms else "layernorm"
    arch["position"] = "rope" if rotary else "learned"
    biases = "disable-bias-linear" not in options
    arch |= {"attention_out_bias": biases, "mlp_bias": biases}
    arch["qkv_bias"] = biases or "add-qkv-bias" in options
    arch["qk_norm"] = "qk-layernorm" in options
    arch["tied_embeddings"] = "untie-embeddings-and-output-weights" not in options
    groups = _number(options, "num-key-value-heads", "num-query-groups")
    arch["kv_heads"] = int(groups) if groups else arch["heads"]
    arch.setdefault("head_dim", arch["hidden"] // arch["heads"])
    arch.setdefault("ffn_hidden", 4 * arch["hidden"])
    arch.setdefault("max_seq_len", found.get("batch.seq_len", 1024))
    theta = _number(options, "rotary-base", "rotary-position-embeddings-theta")
    if rotary and theta:
        arch["rope"] = {"theta": theta}
    if options.get("rotary-percent", ["1.0"])[0] not in ("1.0", "1"):
        found.notes.append("--rotary-percent: rotary embeddings turn whole heads here")
    for name in ("attention-dropout", "hidden-dropout"):
        given = _number(options, name)
        if given is None or given > 0:
            what = f"{given:g}" if given is not None else "0.1, Megatron's default"
            found.notes.append(f"--{name} {what}: there is no dropout here")
    if "apply-layernorm-1p" in options:
        found.notes.append("--apply-layernorm-1p: norm weights are what they are here")


def _vocabulary(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    del command
    arch = found.table["model"]["arch"]
    padded = _number(options, "padded-vocab-size")
    if padded:
        arch["vocab"] = int(padded)
        return
    given = vocab or _number(options, "vocab-size")
    kind = options.get("tokenizer-type") or (
        ["GPT2BPETokenizer"] if "merge-file" in options else []
    )
    if not given and kind == ["GPT2BPETokenizer"]:  # pretrain_gpt.py's default
        given = GPT2_VOCAB
    if not given:
        tokenizer = (options.get("tokenizer-model") or ["the tokenizer"])[0]
        raise UserError(
            f"the script does not say how many entries {tokenizer} has", hint="give --vocab N"
        )
    by = _number(options, "make-vocab-size-divisible-by") or DEFAULT_DIVISIBLE_BY
    multiple = int(by) * found.get("parallel.tp", 1)
    arch["vocab"] = -(-int(given) // multiple) * multiple


def _experts(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    del command, vocab
    experts = _number(options, "num-experts")
    if not experts or experts == 1:
        return
    arch = found.table["model"]["arch"]
    arch["family"] = "mixtral"
    arch["moe"] = {
        "experts": int(experts),
        "active_experts": int(_number(options, "moe-router-topk", "topk") or 1),
        "ffn_hidden": arch["ffn_hidden"],
        "aux_loss_coef": _number(options, "moe-aux-loss-coeff", "moe-loss-coeff") or 0.0,
    }


def _layout(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    del vocab
    stage = _number(options, "zero-stage")
    if stage is None:
        stage = 1 if "use-distributed-optimizer" in options else 0
    found.set("parallel.zero_stage", int(stage))
    granularity = options.get("recompute-granularity", [""])[0]
    full = {"checkpoint-activations", "deepspeed-activation-checkpointing"} & options.keys()
    if granularity == "full" or (full and granularity != "selective"):
        found.set("parallel.recompute", "full")
    elif granularity == "selective" or "recompute-activations" in options:
        found.set("parallel.recompute", "selective")
    if "cpu-optimizer" in options:
        found.set("parallel.offload", "optimizer")
    processes = _processes(command.launcher)
    others = 1
    for axis in ("tp", "pp", "cp"):
        others *= found.get(f"parallel.{axis}", 1)
    if processes is None:
        found.notes.append("the number of processes is not in the script: set parallel.dp")
    elif processes % others:
        raise UserError(f"{processes} processes do not divide into tp*pp*cp = {others}")
    else:
        found.set("parallel.dp", processes // others)
    found.set("run.device", "cuda")


def _processes(launcher: Sequence[str]) -> int | None:
    options = read_options([word.replace("_", "-") for word in launcher])
    per_node = options.get("nproc-per-node") or options.get("num-gpus")
    nodes = options.get("nnodes") or options.get("num-nodes") or ["1"]
    try:
        return int(per_node[0]) * int(nodes[0]) if per_node else None
    except (ValueError, IndexError):
        return None


def _schedule(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    del command, vocab
    batch = found.get("batch.global", found.get("batch.micro", 1) * found.get("parallel.dp", 1))
    found.set("batch.global", batch)
    if "rampup-batch-size" in options:
        growth = [_value("rampup-batch-size", [n], "int") for n in options["rampup-batch-size"]]
        found.set("batch.rampup", growth)
    sequence = found.get("batch.seq_len", 1024)

    def steps(kind: str) -> int | None:
        """Of several lengths the shortest: Megatron ends at the first that is reached."""
        sizes = (("iters", 1), ("samples", batch), ("tokens", batch * sequence))
        counts = [(_number(options, f"{kind}-{unit}"), size) for unit, size in sizes]
        found = [max(1, round(count / size)) for count, size in counts if count]
        return min(found, default=None)

    total = steps("train")
    if total is None:
        raise UserError("--train-iters, --train-samples or --train-tokens is missing")
    found.set("schedule.steps", total)
    fraction = _number(options, "lr-warmup-fraction")
    warm_up = steps("lr-warmup") or (round(fraction * total) if fraction else 0)
    found.set("schedule.warmup_steps", min(warm_up, total))
    style = options.get("lr-decay-style", ["linear"])[0]
    if style not in LR_STYLES:
        found.notes.append(f"--lr-decay-style {style}: cosine is used")
    found.set("schedule.kind", LR_STYLES.get(style, "cosine"))
    decay = steps("lr-decay")
    if decay is not None and decay != total:
        found.notes.append(f"the rate falls over {decay} steps there, over all {total} here")
    optimizer = options.get("optimizer", ["adam"])[0]
    if optimizer == "sgd":
        found.set("optim.name", "sgd")
    elif optimizer != "adam":
        found.notes.append(f"--optimizer {optimizer}: AdamW is used")
    defaults = (("weight_decay", 0.01), ("beta2", 0.999), ("clip", 1.0))
    for name, value in defaults:  # Megatron's own, where the script says nothing
        if found.get(f"optim.{name}") is None:
            found.set(f"optim.{name}", value)


def _data(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    del command, vocab
    paths = options.get("data-path") or options.get("train-data-path") or []
    if not paths or any(path.startswith("$") for path in paths):
        found.notes.append("--data-path is not in the script: set data.paths")
        paths = ["data/corpus_text_document"]
    found.set("data.paths", paths)
    for name in ("tokenizer-model", "vocab-file"):
        given = options.get(name, ["$"])[0]
        if not given.startswith("$"):
            found.set("data.tokenizer", given)
            break
    if "merge-file" in options:
        found.notes.append("--vocab-file and --merge-file: make a tokenizer.json of them")


def _precision(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    del command, vocab
    dtype = next((name for name in ("bf16", "fp16") if name in options), "fp32")
    found.set("precision.dtype", dtype)
    for name, key in FP16_OPTIONS.items() if dtype == "fp16" else ():
        value = _number(options, name)
        if value is not None:
            found.set(f"precision.{key}", max(1, int(value)))
    if dtype == "fp16" and "loss-scale" in options:
        found.notes.append("--loss-scale: the scale is dynamic here")


def _validation(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    del command, vocab
    batches = _number(options, "eval-iters")
    every = _number(options, "eval-interval")
    if batches == 0 or not every:
        return
    if batches is None:
        batches = DEFAULT_EVAL_ITERS
    found.set("eval.every", int(every))
    found.set("eval.samples", int(batches) * found.get("batch.global"))


def _running(found: Migration, options: Options, command: Command, vocab: int | None) -> None:
    """Where a run writes, what it logs to, how long it waits."""
    del command, vocab
    load = options.get("load", [])
    if load and load != options.get("save"):
        found.notes.append(
            f"--load {load[0]}: a run goes on from its own checkpoints; weights to start from are "
            "model.weights"
        )
    folder = options.get("tensorboard-dir", [])
    if folder:
        found.set("logging.tensorboard", True)
        found.notes.append(f"--tensorboard-dir {folder[0]}: OUT/tensorboard is written")
    minutes = _number(options, "distributed-timeout-minutes")
    if minutes:
        found.set("run.hang_timeout_s", 60 * minutes)
    if "accumulate-allreduce-grads-in-fp32" in options:
        parallel = found.table["parallel"]
        if found.get("precision.dtype") == "bf16":
            if parallel.get("ep", 1) == 1 and "offload" not in parallel:
                found.set("precision.accumulate", "fp32")
                return
        elif found.get("precision.dtype") == "fp32":
            return
        found.notes.append("--accumulate-allreduce-grads-in-fp32: not in this layout and precision")
