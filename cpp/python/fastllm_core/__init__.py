"""The native core of fastllm: what the C++ and CUDA code does, as plain functions.

Everything here works on numpy arrays and raw pointers; nothing imports a framework.
"""

from fastllm_core import _core
from fastllm_core._core import (
    DatasetBuilder,
    Encoder,
    InputError,
    JsonError,
    SampleReader,
    blend,
    bytelevel_encoder,
    count_tokens,
    exhaustive_blend,
    features,
    gpt_indices,
    pack_best_fit,
    parse_json_line,
    python_encoder,
    sentencepiece_encoder,
    sentencepiece_info,
    set_mmap_threshold,
    trim_heap,
    write_json_lines,
)

__version__ = "0.1.0"

__all__ = [
    "DatasetBuilder",
    "Encoder",
    "InputError",
    "JsonError",
    "SampleReader",
    "__version__",
    "blend",
    "bytelevel_encoder",
    "count_tokens",
    "exhaustive_blend",
    "features",
    "gpt_indices",
    "pack_best_fit",
    "parse_json_line",
    "python_encoder",
    "sentencepiece_encoder",
    "sentencepiece_info",
    "set_mmap_threshold",
    "trim_heap",
    "write_json_lines",
]

if _core.version() != __version__:
    raise ImportError(
        f"fastllm_core {__version__} found a compiled extension of version {_core.version()}; "
        "reinstall with: pip install --force-reinstall --no-deps ."
    )
