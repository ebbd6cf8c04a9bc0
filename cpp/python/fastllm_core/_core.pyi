"""Types of the compiled extension. One section per file of cpp/bindings."""

from collections.abc import Callable
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

# build_info.cpp
def version() -> str: ...
def features() -> dict[str, Any]: ...

# dataset_builder.cpp
class InputError(ValueError): ...
class JsonError(ValueError): ...

class Encoder:
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> NDArray[np.uint32]: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...

def python_encoder(encode: Callable[[list[str]], list[list[int]]], vocab_size: int) -> Encoder: ...
def sentencepiece_encoder(model_bytes: bytes) -> Encoder: ...
def sentencepiece_info(model_bytes: bytes) -> dict[str, Any]: ...
def bytelevel_encoder(
    *,
    tokens: list[bytes],
    merges: list[tuple[int, int]] | None,
    ignore_merges: bool,
    pattern: str,
    special: list[tuple[str, int]],
) -> Encoder: ...
def pretokenize(pattern: str, text: str) -> list[str]: ...
def parse_json_line(
    line: bytes, keys: list[str], limit: int = ...
) -> list[tuple[str, list[bytes], bool]]: ...

class DatasetBuilder:
    def __init__(
        self,
        encoder: Encoder,
        *,
        keys: list[str],
        targets: list[tuple[str, str]],
        format: str = "json",
        eod_id: int | None = None,
        bos_id: int | None = None,
        append_eod: bool = False,
        empty_document: str = "boundary",
        int32: bool = False,
        stop_on_error: bool = True,
        workers: int = 1,
        block_bytes: int = 1 << 20,
        resume_at: list[tuple[int, int, int]] | None = None,
        on_bad_line: Callable[[str, int, str, bytes], None] | None = None,
        on_written: Callable[[dict[str, int]], None] | None = None,
    ) -> None: ...
    def add_file(
        self, path: str, begin: int = 0, end: int = 2**64 - 1, first_line: int = 0
    ) -> None: ...
    def begin_stream(self, name: str, first_line: int = 0) -> None: ...
    def feed(self, data: bytes | bytearray | memoryview) -> None: ...
    def end_stream(self) -> None: ...
    def sync(self) -> list[tuple[int, int, int]]: ...
    def finish(self) -> list[tuple[int, int, int]]: ...
    def counts(self) -> dict[str, int]: ...
    @property
    def lines_in_source(self) -> int: ...

# gpt_index.cpp
class SampleReader:
    def __init__(
        self,
        *,
        idx: mmap | bytes,
        bin: mmap | bytes,
        header_bytes: int,
        sequences: int,
        item_size: int,
        document_index: NDArray[np.int32],
        sample_index: NDArray[Any],
        shuffle_index: NDArray[Any],
        seq_length: int,
        extra: int,
        pad_id: int,
        eod_id: int,
        eod_mask_loss: bool,
        reset_position_ids: bool,
        packed: bool,
    ) -> None: ...
    # tokens, labels, loss_mask, position_ids and, if packed, cu_seqlens
    def read(self, i: int) -> tuple[NDArray[Any], ...]: ...

def count_tokens(lengths: NDArray[np.int32], documents: NDArray[np.int32]) -> int: ...
def gpt_indices(
    *,
    lengths: NDArray[np.int32],
    documents: NDArray[np.int32],
    epochs: int,
    separate: bool,
    seq_length: int,
    extra: int,
    samples: int,
    first_part: int,
    seed: int,
) -> tuple[NDArray[np.int32], NDArray[Any], NDArray[Any]]: ...
def blend(
    weights: NDArray[np.float64], samples: int, threads: int | None = None
) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...
def exhaustive_blend(
    sizes: NDArray[np.int64], threads: int | None = None
) -> tuple[NDArray[np.int16], NDArray[np.int64]]: ...

# heap.cpp
def set_mmap_threshold(bytes: int) -> bool: ...
def trim_heap() -> bool: ...

# json_lines.cpp
# Validity bits, offsets, data (pyarrow's Array.buffers()), first row, whether offsets have 64 bits.
StringBuffers = tuple[Buffer | None, Buffer, Buffer | None, int, bool]

def write_json_lines(keys: list[str], columns: list[StringBuffers], rows: int) -> bytes: ...

# packing.cpp
def pack_best_fit(
    lengths: NDArray[np.int32], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

# cpu_isa.cpp
def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...

# rmsnorm.cpp. Tensors are DLPack capsules, or objects with __dlpack__.
def rmsnorm_fwd(
    x: object,
    residual: object | None,
    weight: object,
    y: object,
    residual_out: object | None,
    rstd: object,
    eps: float,
    stream: int = 0,
) -> None: ...
def rmsnorm_bwd_parts(rows: int, cols: int, cuda: bool = False, device_id: int = 0) -> int: ...
def rmsnorm_bwd(
    dy: object,
    h: object,
    weight: object,
    rstd: object,
    dh: object | None,
    dx: object,
    dweight: object,
    partial: object,
    stream: int = 0,
) -> None: ...

# glu.cpp
def glu_fwd(gate: object, up: object, y: object, activation: str, stream: int = 0) -> None: ...
def glu_bwd(
    dy: object,
    gate: object,
    up: object,
    dgate: object,
    dup: object,
    activation: str,
    stream: int = 0,
) -> None: ...

# rope.cpp
def rope(
    x: object,
    cos: object,
    sin: object,
    positions: object | None,
    y: object,
    interleaved: bool,
    inverse: bool,
    stream: int = 0,
) -> None: ...

# cross_entropy.cpp
def cross_entropy_fwd(
    logits: object,
    labels: object,
    max: object,
    sum: object,
    target: object,
    first: int = 0,
    ignore: int = -100,
    merge: bool = False,
    stream: int = 0,
) -> None: ...
def cross_entropy_loss(
    logits: object,
    labels: object,
    lse: object,
    loss: object,
    ignore: int = -100,
    stream: int = 0,
) -> None: ...
def cross_entropy_bwd(
    logits: object,
    labels: object,
    lse: object,
    dloss: object,
    dlogits: object,
    first: int = 0,
    ignore: int = -100,
    stream: int = 0,
) -> None: ...

# adamw.cpp
def adamw(
    master: object,
    grad: object,
    exp_avg: object,
    exp_avg_sq: object,
    model: object | None,
    grad_scale: object | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    stream: int = 0,
) -> None: ...

# layernorm.cpp
def layernorm_fwd(
    x: object,
    residual: object | None,
    weight: object,
    bias: object | None,
    y: object,
    residual_out: object | None,
    mean: object,
    rstd: object,
    eps: float,
    stream: int = 0,
) -> None: ...
def layernorm_bwd_parts(rows: int, cols: int, cuda: bool = False, device_id: int = 0) -> int: ...
def layernorm_bwd(
    dy: object,
    h: object,
    weight: object,
    mean: object,
    rstd: object,
    dh: object | None,
    dx: object,
    dweight: object,
    dbias: object | None,
    partial: object,
    stream: int = 0,
) -> None: ...

# bias_gelu.cpp
def bias_gelu_fwd(x: object, bias: object, y: object, stream: int = 0) -> None: ...
def bias_gelu_bwd_parts(rows: int, cols: int, cuda: bool = False, device_id: int = 0) -> int: ...
def bias_gelu_bwd(
    dy: object,
    x: object,
    bias: object,
    dx: object,
    dbias: object,
    partial: object,
    stream: int = 0,
) -> None: ...

# softmax.cpp
def softmax_fwd(
    x: object,
    mask: object | None,
    slopes: object | None,
    y: object,
    scale: float,
    causal: bool,
    stream: int = 0,
) -> None: ...
def softmax_bwd(
    dy: object, y: object, dx: object, scale: float, causal: bool, stream: int = 0
) -> None: ...

# attention.cpp
def attention_fwd(
    q: object, k: object, v: object, out: object, lse: object, scale: float
) -> None: ...
def attention_bwd(
    dout: object,
    q: object,
    k: object,
    v: object,
    out: object,
    lse: object,
    dq: object,
    dk: object,
    dv: object,
    scale: float,
) -> None: ...

# matmul.cpp
def matmul(a: object, b: object, c: object, accumulate: bool) -> None: ...
def matmul_pays() -> bool: ...

# grad_norm.cpp
def squared_sum_parts(count: int, cuda: bool = False) -> int: ...
def squared_sum(x: object, partial: object, stream: int = 0) -> None: ...

# moe_permute.cpp
def moe_permute(slots: object, x: object, y: object, stream: int = 0) -> None: ...
def moe_combine(
    slots: object, weights: object | None, y: object, out: object, stream: int = 0
) -> None: ...
def moe_combine_bwd(
    slots: object,
    weights: object,
    dout: object,
    y: object,
    dy: object,
    dweights: object,
    stream: int = 0,
) -> None: ...
