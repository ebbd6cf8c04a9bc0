"""Where an operator's kernels run: CPU at each vector level, the emulated GPU, a GPU.

A test that takes ``backend`` runs on all of them; those that are missing skip with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings

from fastllm_core import _core, features

ROOT = Path(__file__).resolve().parents[2]

# Of random_inputs.py.
settings.register_profile("thorough", max_examples=1000, deadline=None)


class Backend:
    """Arrays on some device, and the binding's functions that take them."""

    name: str
    core: Any
    cuda: bool

    def put(self, tensor: torch.Tensor, offset: int = 0) -> Any:
        """A copy of the tensor on the device, ``offset`` elements past an aligned address."""
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Any:
        raise NotImplementedError

    def get(self, array: Any) -> torch.Tensor:
        raise NotImplementedError

    def finish(self) -> None:
        """Waits for the device, and fails the test if it found an error."""


class TorchBackend(Backend):
    core = _core

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self.device = device
        self.cuda = device == "cuda"

    def put(self, tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
        array = self.empty(tuple(tensor.shape), tensor.dtype, offset)
        array.copy_(tensor)
        return array

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        count = torch.Size(shape).numel()
        garbage = float("nan") if dtype.is_floating_point else -1
        memory = torch.full((count + offset,), garbage, dtype=dtype, device=self.device)
        return memory[offset:].view(shape)

    def get(self, array: torch.Tensor) -> torch.Tensor:
        return array.cpu()

    def finish(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class EmulatedBackend(Backend):
    cuda = True

    def __init__(self, module: ModuleType, name: str = "emulated") -> None:
        self.name = name
        self.core: Any = module
        self._described: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}

    def put(self, tensor: torch.Tensor, offset: int = 0) -> Any:
        array = self.empty(tuple(tensor.shape), tensor.dtype, offset)
        array.upload(tensor.contiguous().view(torch.uint8).numpy())
        return array

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> Any:
        array = self.core.DeviceArray(list(shape), str(dtype).removeprefix("torch."), offset)
        self._described[id(array)] = (shape, dtype)
        return array

    def get(self, array: Any) -> torch.Tensor:
        shape, dtype = self._described[id(array)]
        tensor = torch.empty(shape, dtype=dtype)
        array.download(tensor.view(torch.uint8).numpy())
        return tensor

    def finish(self) -> None:
        reports = self.core.reports()
        self.core.clear_reports()
        if reports:
            text = "\n".join(f"[{kind}] {kernel}: {what}" for kind, kernel, what in reports)
            pytest.fail(f"the emulator reports (addresses are for addr2line):\n{text}")


def _build_emulator(preset: str, module: str) -> Path:
    """Builds a module of cpp/emulator and returns its path; skips where it cannot be built."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    if cmake is None or shutil.which("g++") is None:
        pytest.skip("building the emulator needs cmake and g++")
    build = ROOT / "build" / preset
    build.mkdir(parents=True, exist_ok=True)
    with (build / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [cmake, "--preset", preset, f"-DFASTLLM_PYTHON={sys.executable}"],
            [cmake, "--build", "--preset", preset, "--target", "help"],
        ):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.fail(
                    f"{' '.join(command)} failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
                )
        if module not in done.stdout:
            pytest.skip(
                f"{module} is no target: CUDA headers, pybind11 or nvidia-cutlass are missing"
            )
        command = [cmake, "--build", "--preset", preset, "--target", module, "-j2"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)} failed:\n{done.stdout[-6000:]}{done.stderr[-3000:]}")
    (library,) = (build / "python").glob(f"{module}.*.so")
    return library


def _load(name: str, library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    return _load("_emulated", _build_emulator("emulate", "_emulated"))


@pytest.fixture(scope="session")
def emulated_ptx_module() -> ModuleType:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH, so there is no PTX to emulate")
    return _load("_emulated_ptx", _build_emulator("emulate-ptx", "_emulated_ptx"))


@pytest.fixture(scope="session")
def emulated_gemm_module() -> ModuleType:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH, so there is no PTX to emulate")
    preset = os.environ.get(
        "FASTLLM_GEMM_PRESET", "emulate-ptx"
    )  # `make test-cutlass`: all of them
    return _load("_emulated_gemm", _build_emulator(preset, "_emulated_gemm"))


@pytest.fixture
def emulated_backend() -> type[EmulatedBackend]:
    return EmulatedBackend


@pytest.fixture
def emulated_ptx(emulated_ptx_module: Any) -> Iterator[EmulatedBackend]:
    """The PTX that nvcc emits, interpreted under the checker."""
    emulated_ptx_module.set_options()
    emulated_ptx_module.clear_reports()
    emulated_ptx_module.clear_counters()
    yield EmulatedBackend(emulated_ptx_module, "ptx")
    emulated_ptx_module.set_options()


@pytest.fixture
def emulated(emulated_module: Any) -> Iterator[EmulatedBackend]:
    emulated_module.set_options()
    emulated_module.clear_reports()
    emulated_module.clear_counters()
    yield EmulatedBackend(emulated_module)
    emulated_module.set_options()


@pytest.fixture(params=["emulated", "ptx"])
def counted(request: pytest.FixtureRequest) -> EmulatedBackend:
    """The source and the PTX, each emulated with bytes, sectors and wavefronts counted."""
    name = {"emulated": "emulated", "ptx": "emulated_ptx"}[request.param]
    backend: EmulatedBackend = request.getfixturevalue(name)
    backend.core.set_options(count_transactions=True)
    return backend


# "cpu" runs the tests of the GPU on the CPU in its place, to try their code.
GPU_DEVICE = os.environ.get("FASTLLM_GPU_DEVICE", "cuda")


def _missing_gpu() -> str | None:
    if GPU_DEVICE == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not features()["cuda"]:
        return "fastllm_core was built without CUDA kernels"
    return None


@pytest.fixture(
    params=[
        "portable",
        "avx2",
        "avx512",
        "emulated",
        "ptx",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name: str = request.param
    if name == "emulated":
        yield request.getfixturevalue("emulated")
    elif name == "ptx":
        yield request.getfixturevalue("emulated_ptx")
    elif name == "cuda":
        reason = _missing_gpu()
        if reason is not None:
            pytest.skip(reason)
        yield TorchBackend("cuda", GPU_DEVICE)
    else:
        if name not in _core.cpu_isas():
            pytest.skip(f"this processor has no {name}")
        before = _core.cpu_isa()
        _core.set_cpu_isa(name)
        yield TorchBackend(name, "cpu")
        _core.set_cpu_isa(before)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of operators that have no other kernels: runs the core at this vector level."""
    if request.param not in _core.cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = _core.cpu_isa()
    _core.set_cpu_isa(request.param)
    yield request.param
    _core.set_cpu_isa(before)


@pytest.fixture
def gpu_device() -> str:
    reason = _missing_gpu()
    if reason is not None:
        pytest.skip(reason)
    return GPU_DEVICE


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads of torch and of fastllm_core, which share their OpenMP runtime."""
    before = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        yield torch.set_num_threads
