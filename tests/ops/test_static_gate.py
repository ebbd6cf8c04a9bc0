"""The committed tables of registers and instructions are what nvcc makes now; nothing spills."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import cubins  # noqa: E402
import ptxas_table  # noqa: E402
import sass_gate  # noqa: E402
from ptxas_table import Kernel  # noqa: E402


@pytest.mark.parametrize(
    ("command", "tool"),
    [(("ptxas_table.py", "--check"), "nvcc"), (("sass_gate.py",), "nvdisasm")],
    ids=["registers", "instructions"],
)
def test_holds(command: tuple[str, ...], tool: str) -> None:
    for name in ("nvcc", tool):
        if cubins.cuda_tool(name) is None:
            pytest.skip(f"no {name} (requirements/cuda.txt)")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_source_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of cpp/src/cuda is outside the gates, and a folder that they do not know is an error."""
    sources = set(cubins.CUDA.rglob("*.cu"))
    assert {source for source, _ in cubins.jobs(gemm=True, every=True)} == sources
    left_to_all = sources - {source for source, _ in cubins.jobs(gemm=True, every=False)}
    assert {cubins.folder(source) for source in left_to_all} == {"gemm/sm90"}
    always = {source.stem for source in sources - left_to_all if "sm90" in str(source)}
    assert always == {"linear_bias_bf16", "linear_swiglu_bf16", "linear_weight_grad_bf16"}
    names = [cubins.instance(source) for source in sources]
    assert len(set(names)) == len(names)
    monkeypatch.setattr(cubins, "CUDA", tmp_path)
    (tmp_path / "gemm/sm120").mkdir(parents=True)
    (tmp_path / "gemm/sm120/linear_bias_bf16.cu").touch()
    with pytest.raises(ValueError, match="no architecture for gemm/sm120"):
        cubins.jobs(gemm=True, every=False)


LOG = """\
ptxas info    : Compiling entry function '_ZN7fastllm4cuda1kIfEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN7fastllm4cuda1kIfEEvPf
    8 bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 384 bytes cmem[0]
"""


def test_parse_and_compare() -> None:
    kernels = ptxas_table.parse(LOG.format(spill=0))
    assert kernels == {"_ZN7fastllm4cuda1kIfEEvPf": Kernel(40, 128, 0)}
    table = {"sm_80": {"k<float>": Kernel(40, 128, 0)}}
    same = {"nvcc": "13.0", "sm_80": {"k<float>": {"registers": 40, "shared_bytes": 128}}}
    assert ptxas_table.differences("13.0", table, same) == []
    for other in ({"k<float>": {"registers": 41, "shared_bytes": 128}}, {}):
        (line,) = ptxas_table.differences("13.0", table, {"nvcc": "13.0", "sm_80": other})
        assert line.startswith("sm_80 k<float>: {'registers': 40, 'shared_bytes': 128}, the table")
    assert ptxas_table.differences("13.1", table, {"nvcc": "13.0", "sm_80": {}}) == []


def test_spills_need_a_reason_and_warnings_are_errors() -> None:
    (kernel,) = ptxas_table.parse(LOG.format(spill=4)).values()
    assert kernel.spill_bytes == 8
    table = {"sm_80": {"k": kernel}}
    found = ptxas_table.differences("12.9", table, {"nvcc": "13.0"})
    assert found == ["sm_80 k: 8 bytes of spills"]
    row = {"k": {"registers": 40, "shared_bytes": 128}}
    allowed = {"nvcc": "13.0", "spills": {"sm_80 k": "why"}, "sm_80": row}
    assert ptxas_table.differences("13.0", table, allowed) == []
    mended = {"sm_80": {"k": Kernel(40, 128, 0)}}
    assert ptxas_table.differences("13.0", mended, allowed) == [
        "sm_80 k: spills are allowed, and it has none"
    ]
    with pytest.raises(ValueError, match="C7510"):
        ptxas_table.parse("ptxas warning : C7510 wgmma serialized")


def test_names_of_kernels() -> None:
    gemm = cubins.CUDA / "gemm/linear_bias_bf16.cu"
    cubin = cubins.Cubin(gemm, "sm_80", gemm, "")
    symbols = ["_ZN7fastllm4cuda1kIfEEvPf", "_ZN7cutlass1aEv", "_ZN7cutlass1bEv"]
    names = ptxas_table.short_names(symbols, cubin)
    assert list(names.values()) == ["k<float>", "linear_bias_bf16", "linear_bias_bf16 2"]


LISTING = """\
\t.section\t.text._Zk,"ax",@progbits
.text._Zk:
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R12 ;
        /*0030*/                   NOP ;
.text._Zm:
        /*0000*/              @UP1 STL [R1], R8 (*"SpillRefill"*);
"""


def test_instructions_are_counted() -> None:
    counts = sass_gate.instructions(LISTING)
    assert counts["_Zk"] == {"LDG.E.128.CONSTANT": 1, "STG.E.128": 1, "HMMA.16816.F32.BF16": 1}
    assert counts["_Zm"] == {"STL": 1}
    for pattern, times in (("LDG.128", 1), ("LDG", 1), ("LDG.64", 0), ("HMMA.F32", 1), ("LD", 0)):
        assert sass_gate.count(counts["_Zk"], pattern) == times


@pytest.mark.parametrize(
    ("kernel", "wide"),
    [
        ("k<float, 4>", True),
        ("k<__half, __nv_bfloat16, 8>", True),
        ("k<__half, 8, true>", True),
        ("k<__half, 2, true>", False),
        ("k<float, 1, 0>", False),
        ("k", False),
    ],
)
def test_wide_instances(kernel: str, wide: bool) -> None:
    assert sass_gate.is_wide(kernel) == wide


def test_shortfalls() -> None:
    key = ("sm_80", "k<float, 4>")
    entry = {"wide": {"LDG.128": 2}, "every": {"STG": 1}, "sm_90": {"HGMMA": 1}}
    good: Counter[str] = Counter({"LDG.E.128": 2, "STG.E": 1})
    assert sass_gate.shortfalls({key: good}, {"k": entry}) == []
    narrow: Counter[str] = Counter({"LDG.E.64": 4, "STG.E": 1})
    assert sass_gate.shortfalls({key: narrow}, {"k": entry}) == [
        "sm_80 k<float, 4>: 0 LDG.128, expected 2"
    ]
    assert sass_gate.shortfalls({("sm_90", "k<float, 1>"): good}, {"k": entry}) == [
        "sm_90 k<float, 1>: 0 HGMMA, expected 1"
    ]
    spilling = good + Counter({"LDL": 1, "STL": 1})
    assert sass_gate.shortfalls({key: spilling}, {"k": entry}) == [
        "sm_80 k<float, 4>: 2 accesses to local memory"
    ]
    assert sass_gate.shortfalls({key: spilling}, {"k": entry | {"local_memory": "why"}}) == []
    assert sass_gate.shortfalls({key: good}, {}) == [
        "sm_80 k<float, 4>: sass.toml expects nothing of it"
    ]
    assert sass_gate.shortfalls({}, {"k": entry}) == ["k: sass.toml expects it, and there is none"]
