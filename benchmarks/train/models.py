"""The benchmark's model in every trainer: each builder returns a function that takes one step.

Imports are inside the builders: each trainer runs in a process of its own. Peers run with fp32
weights, in bf16 under autocast (their trainers' mixed precision), but for ``hf_pure_compile``,
whose weights and optimizer are bf16. What a peer needs to run on a CPU at all stands at its
builder.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

VOCAB, SEQ_LEN, MICRO = 32_000, 512, 4
ARCH = {
    "family": "llama",
    "layers": 8,
    "hidden": 512,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "ffn_hidden": 1376,
    "vocab": VOCAB,
    "max_seq_len": SEQ_LEN,
}
Step = Callable[[torch.Tensor], Any]


def fastllm(dtype: str, *, compiled: bool = False, engine: str = "auto") -> Step:
    """The trainer's own engine, as ``fastllm-train run`` steps it; ``speed.compile``."""
    import numpy as np

    from fastllm_train.config import build_config
    from fastllm_train.data import MicroBatch
    from fastllm_train.distributed import Place, join
    from fastllm_train.engine_choice import build_engine

    config = build_config(
        {
            "model": {"arch": ARCH},
            "parallel": {"zero_stage": 0},
            "batch": {"micro": MICRO, "global": MICRO, "seq_len": SEQ_LEN},
            "precision": {"dtype": dtype},
            "speed": {"recompute_elementwise": True, "compile": compiled, "engine": engine},
        }
    )
    alone()
    join(Place(0, 1, 0, 1), "cpu")
    trainer = build_engine(config, config.model.resolve(), "cpu")
    positions = np.tile(np.arange(SEQ_LEN), (MICRO, 1))
    mask = np.ones((MICRO, SEQ_LEN), dtype=np.float32)

    def step(tokens: torch.Tensor) -> None:
        ids = tokens.numpy()
        batch = MicroBatch(ids, np.roll(ids, -1, 1), mask, positions)
        trainer.train_step([batch], 1e-4, stop=False)

    return step


def fastllm_loop(dtype: str, kernels: str = "fused") -> Step:
    """The same model in the plain loop of the peers; in bf16 weights and optimizer are bf16."""
    from fastllm_planner.arch import spec_from_dict
    from fastllm_train.models.decoder import Decoder, TrainingModel
    from fastllm_train.models.initialise import initialise
    from fastllm_train.models.kernels import kernels_of

    spec = spec_from_dict(ARCH)
    model = TrainingModel(Decoder(spec, recompute_elementwise=True, kernels=kernels_of(kernels)))
    initialise(model, spec, 0)
    model.to(torch_dtype(dtype))
    positions = torch.arange(SEQ_LEN).expand(MICRO, -1)
    mask = torch.ones(MICRO, SEQ_LEN)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, positions, tokens.roll(-1, 1), mask).objective / mask.sum()

    return plain_loop(model, loss_of, "fp32")


def fastllm_torch(dtype: str) -> Step:
    """``speed.kernels = "torch"``: operation by operation."""
    return fastllm_loop(dtype, "torch")


def hugging_face(dtype: str, *, compiled: bool = False, pure: bool = False) -> Step:
    model = hugging_face_model(torch_dtype(dtype) if pure else torch.float32)
    run: Any = torch.compile(model) if compiled else model
    autocast = "fp32" if pure else dtype
    return plain_loop(model, lambda x: run(input_ids=x, labels=x).loss, autocast)


def hf_deepspeed(dtype: str) -> Step:
    """Hugging Face's model in DeepSpeed, ZeRO-1, DeepSpeed's gradient clipping, torch's AdamW."""
    from fastllm_train.engine_deepspeed import import_deepspeed

    deepspeed = import_deepspeed("cpu")
    alone()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = hugging_face_model(torch.float32)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        config={
            "train_batch_size": MICRO,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": dtype == "bf16"},
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31 - 1,
        },
        dist_init_required=False,
    )

    def step(tokens: torch.Tensor) -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    return step


def litgpt(dtype: str, *, compiled: bool = False) -> Step:
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    config = Config(
        block_size=SEQ_LEN,
        vocab_size=VOCAB,
        padded_vocab_size=VOCAB,
        n_layer=ARCH["layers"],
        n_head=ARCH["heads"],
        n_embd=ARCH["hidden"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=ARCH["ffn_hidden"],
    )
    model = GPT(config)
    run: Any = torch.compile(model) if compiled else model

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(run(tokens), tokens.roll(-1, 1), chunk_size=0)

    return plain_loop(model, loss_of, dtype)


def torchtitan(dtype: str) -> Step:
    """0.3 imports triton and refuses SDPA for language models, whose flex attention has no
    backward pass on a CPU: a stand-in for the former, its own SDPA class put in for the latter."""
    # Before the stand-in, so that torch does not take it for triton.
    import torch._dynamo
    import torch._inductor.runtime.triton_compat

    triton = sys.modules.setdefault("triton", stand_in("triton"))
    language = sys.modules.setdefault("triton.language", stand_in("triton.language"))
    triton.language = language  # type: ignore[attr-defined]
    import torchtitan.models.common.config_utils as config_utils  # pyright: ignore[reportMissingImports]
    import torchtitan.models.llama3 as llama3  # pyright: ignore[reportMissingImports]
    from torchtitan.models.common.attention import (  # pyright: ignore[reportMissingImports]
        ScaledDotProductAttention,
    )

    config_utils.get_attention_config = lambda _: ScaledDotProductAttention.Config()
    llama3.get_attention_config = config_utils.get_attention_config
    width = ARCH["hidden"]
    config = llama3.Llama3Model.Config(
        dim=width,
        vocab_size=VOCAB,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=VOCAB, embedding_dim=width, param_init=llama3._EMBEDDING_INIT
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=width, param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=width, out_features=VOCAB, param_init=llama3._output_linear_init(width)
        ),
        layers=llama3._build_llama3_layers(
            n_layers=ARCH["layers"],
            dim=width,
            n_heads=ARCH["heads"],
            hidden_dim=ARCH["ffn_hidden"],
            rope=llama3.ComplexRoPE.Config(dim=ARCH["head_dim"], max_seq_len=SEQ_LEN),
            attn_backend="sdpa",
        ),
    )
    with torch.device("cpu"):
        model = config.build()
    model.to_empty(device="cpu")
    model.init_states() if hasattr(model, "init_states") else model.init_weights()

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens).flatten(0, 1).float()
        return F.cross_entropy(logits, tokens.roll(-1, 1).flatten())

    return plain_loop(model, loss_of, dtype)


def megatron_core(dtype: str) -> Step:
    """0.16 asks CUDA for its device in three places; on a CPU they are answered here."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (8, 0)  # type: ignore[assignment]
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()  # type: ignore[assignment]
    alone()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(1, 1)
    config = TransformerConfig(
        num_layers=ARCH["layers"],
        hidden_size=ARCH["hidden"],
        num_attention_heads=ARCH["heads"],
        ffn_hidden_size=ARCH["ffn_hidden"],
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        bf16=dtype == "bf16",
        params_dtype=torch_dtype(dtype),
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=SEQ_LEN,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    model.to(torch_dtype(dtype))
    positions = torch.arange(SEQ_LEN).expand(MICRO, -1)
    mask = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)[None, None]

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, positions, mask, labels=tokens.roll(-1, 1)).float().mean()

    return plain_loop(model, loss_of, "fp32")


BUILDERS: dict[str, Callable[[str], Step]] = {
    "fastllm": fastllm,
    "fastllm_compile": lambda dtype: fastllm(dtype, compiled=True),
    "fastllm_deepspeed": lambda dtype: fastllm(dtype, engine="deepspeed"),
    "fastllm_loop": fastllm_loop,
    "fastllm_torch": fastllm_torch,
    "hf": hugging_face,
    "hf_compile": lambda dtype: hugging_face(dtype, compiled=True),
    "hf_pure_compile": lambda dtype: hugging_face(dtype, compiled=True, pure=True),
    "hf_deepspeed": hf_deepspeed,
    "litgpt": litgpt,
    "litgpt_compile": lambda dtype: litgpt(dtype, compiled=True),
    "torchtitan": torchtitan,
    "megatron_core": megatron_core,
}
EAGER = ("hf", "hf_deepspeed", "litgpt", "torchtitan", "megatron_core")


def plain_loop(model: Any, loss_of: Callable[[torch.Tensor], torch.Tensor], autocast: str) -> Step:
    """Forward, backward, clipping, torch's fused AdamW."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step(tokens: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "bf16"):
            loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face_model(dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastllm_planner.arch import spec_from_dict, to_hf_config

    config = AutoConfig.for_model(**to_hf_config(spec_from_dict(ARCH)))
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)


def torch_dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if name == "bf16" else torch.float32


def alone() -> None:
    """torch.distributed's environment for a job of one process."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def stand_in(name: str) -> types.ModuleType:
    """A module of which everything can be imported and decorated with, and nothing run."""

    def decorator(*args: Any, **_: Any) -> Any:
        return args[0] if args and callable(args[0]) else decorator

    module = types.ModuleType(name)

    def attribute(key: str) -> Any:
        if key.startswith("__"):  # what Python asks every module for
            raise AttributeError(key)
        return decorator

    module.__getattr__ = attribute  # type: ignore[method-assign]
    module.__path__ = []  # type: ignore[attr-defined]
    module.__version__ = "0"  # type: ignore[attr-defined]
    return module
