"""Cubins of every CUDA source of cpp/src/cuda, compiled as for a wheel, with what ptxas said.

``compiled()`` compiles what is not yet in build/cubins; the scripts that look at registers
(ptxas_table.py) and at instructions (sass_gate.py) share it. Needs no GPU, but nvcc: on PATH, named
by CUDACXX, or of the wheels in requirements/cuda.txt.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "cpp/src/cuda"
BUILD = ROOT / "build/cubins"
# The first two are what a wheel contains by default; newer GPUs run sm_90's PTX.
OP_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Of the products, by the folder that an instance is in: CUTLASS 2.x, and 3.x for sm_90a alone.
GEMM_ARCHITECTURES = {"gemm": "sm_80", "gemm/sm90": "sm_90a"}
ARCHITECTURES = tuple(dict.fromkeys((*OP_ARCHITECTURES, *GEMM_ARCHITECTURES.values())))
# A third of a minute of a core each: compiled where every instance is asked for (`--all`). The
# others of gemm/sm90, three, have every kind of operand and epilogue between them.
SLOW = (
    "gemm/sm90/*_fp16.cu",
    "gemm/sm90/linear_bias_gelu_bf16.cu",
    "gemm/sm90/grouped_linear_bf16.cu",
)


class MissingTool(Exception):
    """What is missing; ``hint``: where it comes from."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Cubin:
    source: Path
    architecture: str
    path: Path
    log: str  # of ptxas -v


def cuda_tool(name: str, variable: str | None = None) -> str | None:
    """A program of the toolkit: named by ``variable``, on PATH, or of a wheel nvidia-cuda-*."""
    named = os.environ.get(variable) if variable else None
    found = named or shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    spec = None if found else find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        found = found or shutil.which(name, path=f"{place}/cu13/bin")
    return found


def nvcc_command() -> str:
    nvcc = cuda_tool("nvcc", "CUDACXX")
    if nvcc is None:
        raise MissingTool("no nvcc", "pip install -r requirements/cuda.txt, or set CUDACXX")
    return nvcc


def nvcc_release(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise ValueError(f"{nvcc} --version names no release")
    return match[1]


def cutlass_source() -> Path | None:
    """The folder that holds CUTLASS's include/ and examples/, as cmake/Cutlass.cmake finds it."""
    named = os.environ.get("CUTLASS_DIR")
    if named:
        return Path(named)
    spec = find_spec("cutlass_library")
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "source/include/cutlass/cutlass.h").exists():
            return Path(place) / "source"
    return None


def folder(source: Path) -> str:
    """Where below cpp/src/cuda: "." for an operator, "gemm/sm90" for a product of sm_90a."""
    return source.parent.relative_to(CUDA).as_posix()


def instance(source: Path) -> str:
    """What a product's kernel is called by: ``linear_bias_bf16``, ``linear_bias_sm90_bf16``."""
    product, _, dtype = source.stem.rpartition("_")
    special = folder(source).removeprefix("gemm").removeprefix("/")
    return f"{product}_{special}_{dtype}" if special else source.stem


def is_slow(source: Path) -> bool:
    path = source.relative_to(CUDA)
    return any(map(path.match, SLOW))


def jobs(gemm: bool, every: bool) -> list[tuple[Path, str]]:
    """(source, architecture); the slowest first, so that the cores finish together.

    ``gemm``: with the products; ``every``: also those that take long. Raises ValueError for a
    source in a folder of which no architecture is known."""
    found: list[tuple[Path, str]] = []
    for source in sorted(CUDA.rglob("*.cu")):
        where = folder(source)
        if where == ".":
            found += [(source, architecture) for architecture in OP_ARCHITECTURES]
        elif where not in GEMM_ARCHITECTURES:
            raise ValueError(f"cubins.py names no architecture for {where}, of {source.name}")
        elif gemm and (every or not is_slow(source)):
            found.append((source, GEMM_ARCHITECTURES[where]))
    return sorted(found, key=lambda job: folder(job[0]), reverse=True)


def left_out(cubins: list[Cubin]) -> set[str]:
    """Names of the products' kernels that were not compiled: for want of CUTLASS, or the slow."""
    sources = {cubin.source for cubin in cubins}
    absent = {instance(source) for source in (CUDA / "gemm").rglob("*.cu") if source not in sources}
    # The one kernel there that is not CUTLASS's, and has a name of its own.
    return absent | ({"grouped_workspace_kernel"} if "grouped_workspace" in absent else set())


def flags(source: Path, cutlass: Path | None) -> list[str]:
    """As CMake compiles it: cmake/Cuda.cmake, and for the GEMMs cmake/Cutlass.cmake."""
    found = ["-std=c++17", "-O3", f"-I{ROOT / 'cpp/include'}", "-Xptxas", "-v", "-cubin"]
    if folder(source) != ".":
        folders = ("include", "examples/45_dual_gemm", "examples", "tools/util/include")
        found += ["-DNDEBUG", "--expt-relaxed-constexpr"]
        for path in folders:
            found += ["-isystem", f"{cutlass}/{path}"]
    return found


def inputs_key(nvcc: str, cutlass: Path | None) -> str:
    """Changes with any source or header, the compiler, and the flags."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    version = cutlass and cutlass / "include/cutlass/version.h"
    if version and version.exists():
        digest.update(version.read_bytes())
    for tree in (CUDA, ROOT / "cpp/include"):
        for path in sorted(p for p in tree.rglob("*") if p.suffix in (".cu", ".cuh", ".hpp")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def compile_one(nvcc: str, cutlass: Path | None, source: Path, architecture: str) -> Cubin:
    """Raises CalledProcessError if it does not compile."""
    path = BUILD / f"{instance(source)}.{architecture}.cubin"
    log = path.with_suffix(".log")
    if not log.exists():
        command = [nvcc, *flags(source, cutlass), f"-arch={architecture}", "-o", path, source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise subprocess.CalledProcessError(
                done.returncode, [str(word) for word in command], done.stdout, done.stderr
            )
        log.write_text(done.stderr)  # last: says that the cubin is whole
    return Cubin(source, architecture, path, log.read_text())


def compiled(every: bool = False) -> list[Cubin]:
    """A cubin of each source: without CUTLASS of none in gemm, without ``every`` of none in SLOW.

    Raises MissingTool without nvcc, CalledProcessError if a source does not compile."""
    nvcc, cutlass = nvcc_command(), cutlass_source()
    key = inputs_key(nvcc, cutlass)
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = BUILD / "inputs"
        if not stamp.exists() or stamp.read_text() != key:
            for old in BUILD.glob("*.log"):
                old.unlink()
            stamp.write_text(key)
        with ThreadPoolExecutor(max_workers=2) as pool:
            wanted = jobs(cutlass is not None, every)
            return list(pool.map(lambda job: compile_one(nvcc, cutlass, *job), wanted))
