"""How the same arithmetic is run ([speed])."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SpeedConfig:
    """``kernels``: "fused" runs norms, rotary embedding, gated units and cross entropy through the
    native core; "torch" operation by operation, the reference that the tests compare with.

    ``engine``: "torch" is the trainer's own, for states that are not sharded over replicas;
    "deepspeed" does ZeRO, offload and fp16, and writes DeepSpeed's checkpoints; "auto" takes
    DeepSpeed only where it is needed.

    ``attention``: "auto" takes the flash-attn package where it is installed, on a GPU in bf16 and
    fp16, and on a CPU the native core's kernel, if ``kernels`` is "fused"; "sdpa" always
    torch's own. ``deterministic``: flash-attn's backward pass gives the same
    bits each time, at some of its speed; without it a resumed run is equal up to rounding.

    ``recompute_elementwise``: the outputs of norms and activations are made again in the backward
    pass, to the same bits, instead of being kept: some 30 % less memory for activations, 1 % of the
    time.

    ``compile``: each layer is one graph of torch.compile, in which the fused operators stay what
    they are and the compiler decides what is kept (``recompute_elementwise`` has no effect there).
    The first step takes its time, and on a CPU a C++ compiler.

    ``allocator`` (CPU, glibc): "fast" keeps freed memory for the next step, "compact" gives large
    blocks back: some 15 % less memory at some 10 % of the speed, with small models."""

    engine: Literal["auto", "torch", "deepspeed"] = "auto"
    kernels: Literal["fused", "torch"] = "fused"
    attention: Literal["auto", "sdpa"] = "auto"
    deterministic: bool = True
    recompute_elementwise: bool = False
    compile: bool = False
    allocator: Literal["fast", "compact"] = "fast"
