"""Definition of torch operators over kernels of fastllm_core, which knows tensors by DLPack.

An operator is called in one of two ways. Where torch only has to run it, on plain tensors, its
kernel is called directly, inside an ``autograd.Function`` where gradients are wanted: 3 to 8
microseconds a call on a CPU. Under ``torch.compile``, ``FakeTensorMode``, any other mode or
transform, and for subclasses of Tensor, it goes through torch's dispatcher, which takes 10 to 25.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch  # before fastllm_core: both then share torch's OpenMP threads and their number
from torch.utils import dlpack

__all__ = [
    "capsule",
    "contiguous_capsule",
    "define",
    "define_differentiable",
    "direct_function",
    "optional_capsule",
    "runs_directly",
    "stream_of",
]

Operator = Callable[..., Any]

# A DLPack capsule of the tensor, with its strides: the function behind torch.Tensor.__dlpack__,
# without its 5 microseconds of Python.
capsule: Callable[[torch.Tensor], object] = vars(dlpack)["to_dlpack"]
_library = torch.library.Library("fastllm", "FRAGMENT")

# What stands between a call and its kernel. torch has no public names for these.
_dispatch_modes: Callable[[], int] = vars(torch._C)["_len_torch_dispatch_stack"]
_function_modes: Callable[[], int] = vars(torch._C)["_len_torch_function_stack"]
_transforms_active: Callable[[], bool] = vars(torch._C)["_are_functorch_transforms_active"]
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def runs_directly(arguments: Sequence[object]) -> bool:
    """Whether nothing but autograd can want to see a call with these arguments."""
    if torch.compiler.is_compiling() or _dispatch_modes() or _function_modes():
        return False
    if _transforms_active():
        return False
    for a in arguments:  # noqa: SIM110, all() of a generator takes as long as the kernel
        if type(a) not in _PLAIN and isinstance(a, torch.Tensor):
            return False
    return True


def _wants_gradient(arguments: Sequence[object]) -> bool:
    if torch.is_grad_enabled():
        for a in arguments:
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


def _register(schema: str, kernel: Operator, fake: Operator) -> tuple[str, Operator]:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"fastllm::{name}", fake, lib=_library)
    return name, getattr(torch.ops.fastllm, name).default


def define(
    schema: str, kernel: Operator, fake: Operator, *, mutates: tuple[int, ...] = ()
) -> Operator:
    """Defines ``fastllm::<schema>`` with one kernel for CPU and CUDA tensors.

    ``fake`` makes the outputs' metadata only. Outputs must be fresh and contiguous. ``mutates``
    are the places of the arguments that the kernel writes. Returns the function to call, with
    positional arguments.
    """
    _, operator = _register(schema, kernel, fake)

    def call(*arguments: Any) -> Any:
        # A gradient that is not defined is the dispatcher's to refuse.
        if not runs_directly(arguments) or _wants_gradient(arguments):
            return operator(*arguments)
        result = kernel(*arguments)
        for place in mutates:
            if arguments[place] is not None:
                torch.autograd.graph.increment_version(arguments[place])
        return result

    return call


def define_differentiable(
    schema: str,
    kernel: Operator,
    fake: Operator,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Operator:
    """As :func:`define`, with a gradient: the arguments of ``torch.library.register_autograd``."""
    name, operator = _register(schema, kernel, fake)
    torch.library.register_autograd(
        f"fastllm::{name}", backward, setup_context=setup_context, lib=_library
    )

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = kernel(*arguments)
        setup_context(ctx, arguments, output)
        return output

    apply = direct_function(name, forward, backward)

    def call(*arguments: Any) -> Any:
        if not runs_directly(arguments):
            return operator(*arguments)
        return apply(*arguments) if _wants_gradient(arguments) else kernel(*arguments)

    return call


def direct_function(name: str, forward: Operator, backward: Operator) -> Operator:
    """``apply`` of an ``autograd.Function`` made of the two, for calls that run directly.

    It is the method behind ``Function.apply``, which takes 2 microseconds to look for transforms.
    """
    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), members)
    beneath: Any = super(torch.autograd.Function, function)
    return beneath.apply


def contiguous_capsule(tensor: torch.Tensor) -> object:
    """A DLPack capsule of the tensor, copied first if it is not contiguous."""
    return capsule(tensor.contiguous())


def optional_capsule(tensor: torch.Tensor | None) -> object:
    """As :func:`contiguous_capsule`; None for None."""
    return None if tensor is None else capsule(tensor.contiguous())


def stream_of(tensor: torch.Tensor) -> int:
    """The address of the current CUDA stream of the tensor's device; 0 for a CPU tensor."""
    if not tensor.is_cuda:
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream
