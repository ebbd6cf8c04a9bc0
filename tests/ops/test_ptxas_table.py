"""The committed table of registers and shared memory is what nvcc makes now; nothing spills."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/ptxas_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ptxas_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ptxas_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_table_holds(script: ModuleType) -> None:
    if script.nvcc_command() is None:
        pytest.skip("no nvcc on PATH")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


LOG = """\
ptxas info    : Compiling entry function '_ZN7fastllm4cuda1kIfEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN7fastllm4cuda1kIfEEvPf
    8 bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem, 384 bytes cmem[0]
"""


def test_parse_and_compare(script: ModuleType) -> None:
    kernels = script.parse(LOG.format(spill=0))
    assert kernels == {"_ZN7fastllm4cuda1kIfEEvPf": script.Kernel(40, 128, 0)}
    table = {"sm_80": {"k<float>": script.Kernel(40, 128, 0)}}
    same = {"nvcc": "13.0", "sm_80": {"k<float>": {"registers": 40, "shared_bytes": 128}}}
    assert script.differences("13.0", table, same) == []
    for other in ({"k<float>": {"registers": 41, "shared_bytes": 128}}, {}):
        (line,) = script.differences("13.0", table, {"nvcc": "13.0", "sm_80": other})
        assert line.startswith("sm_80 k<float>: {'registers': 40, 'shared_bytes': 128}, the table")
    assert script.differences("13.1", table, {"nvcc": "13.0", "sm_80": {}}) == []


def test_spills_and_warnings_are_errors(script: ModuleType) -> None:
    (kernel,) = script.parse(LOG.format(spill=4)).values()
    assert kernel.spill_bytes == 8
    found = script.differences("12.9", {"sm_80": {"k": kernel}}, {"nvcc": "13.0"})
    assert found == ["sm_80 k: 8 bytes of spills"]
    with pytest.raises(ValueError, match="C7510"):
        script.parse("ptxas warning : C7510 wgmma serialized")
