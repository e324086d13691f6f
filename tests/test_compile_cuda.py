"""What `make cuda` reads out of nvcc's and ptxas's words, and what it makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import compile_cuda
from racecar_kernels import cuda_toolkit

PTX = """
.visible .entry _Z4evenPf(
	.param .u64 .ptr .align 1 _Z4evenPf_param_0
)
.maxntid 256, 1, 1
.minnctapersm 2
{
	ret;
}
.visible .entry wide_(
	.param .align 8 .b8 wide__param_0[112]
)
{
	.reg .b32 	%r<3>;
}
.visible .entry flat(
)
.reqntid 32, 4
{
}
"""

# As nvcc 13.0 prints it.
TOLD = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4evenPf' for 'sm_90'
ptxas info    : Function properties for _Z4evenPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, {shared} bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 29.073 ms
ptxas info    : Compiling entry function 'wide_' for 'sm_90'
ptxas info    : Function properties for wide_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used {wide} registers, used 0 barriers
ptxas info    : Function properties for not_inlined
    {called_stack} bytes stack frame, 0 bytes spill stores, {called} bytes spill loads
"""
GOOD = dict(stack=0, stores=0, loads=0, registers=40, shared=1024, wide=64, called=0, called_stack=0)


def read(**changes: int) -> list[compile_cuda.Kernel]:
    bounds = compile_cuda.bounds_in(PTX)
    del bounds["flat"]
    return compile_cuda.read_back(TOLD.format(**{**GOOD, **changes}), bounds, "kernels.cu")


def test_launch_bounds_are_read_and_say_how_many_registers_fit() -> None:
    bounds = compile_cuda.bounds_in(PTX)
    assert bounds == {"_Z4evenPf": (256, 2), "wide_": (1024, 1), "flat": (128, 1)}
    assert [bounds[name].registers for name in bounds] == [128, 64, 255]
    assert compile_cuda.Bounds(768).registers == 80  # 85 would fit, but they are given out in eights


def test_figures_of_every_kernel_are_read() -> None:
    even, wide = read(stack=16, called_stack=24)
    even, wide = (replace(kernel, trouble="") for kernel in (even, wide))
    assert even == compile_cuda.Kernel("_Z4evenPf", "kernels.cu", 90, 40, 128, 0, 16, 1024)
    assert wide == compile_cuda.Kernel("wide_", "kernels.cu", 90, 64, 64, 0, 24, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(stores=8, loads=12), ["spills 20 bytes a thread", ""]),
        (dict(called=4), ["", "spills 4 bytes a thread"]),
        (dict(stack=16), ["has a stack of 16 bytes a thread: something is indexed that registers cannot hold", ""]),
        (
            dict(called_stack=8),
            ["", "has a stack of 8 bytes a thread: something is indexed that registers cannot hold"],
        ),
        (dict(registers=129), ["has 129 registers a thread, for 2 × 256 threads at most 128 fit", ""]),
        (dict(wide=65), ["", "has 65 registers a thread, for 1 × 1024 threads at most 64 fit"]),
        (dict(shared=49153), ["has 49153 bytes of static shared memory, a block gets 49152", ""]),
        (dict(registers=128, shared=49152), ["", ""]),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, int], says: list[str]) -> None:
    assert [kernel.trouble for kernel in read(**changes)] == says


def test_a_kernel_of_which_nothing_is_said_is_no_good_kernel() -> None:
    with pytest.raises(ValueError, match="ptxas says nothing of flat"):
        compile_cuda.read_back(TOLD.format(**GOOD), compile_cuda.bounds_in(PTX), "kernels.cu")
    with pytest.raises(ValueError, match="neither stack nor registers of wide_"):
        compile_cuda.read_back("Compiling entry function 'wide_' for 'sm_90'\n", compile_cuda.bounds_in(PTX), "x.cu")


def test_without_a_compiler_there_is_a_status_of_its_own(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert compile_cuda.main([]) == 3
    assert f"there is no nvcc: CUDA_HOME={tmp_path} has no bin/nvcc" in capsys.readouterr().err
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho it broke >&2\nexit 4\n")
    (tmp_path / "bin" / "nvcc").chmod(0o755)
    assert compile_cuda.main([]) == 1
    assert "nvcc --version failed: it broke" in capsys.readouterr().err


def test_a_kernel_that_spills_fails_the_run(monkeypatch, tmp_path: Path, capsys) -> None:
    nvcc = cuda_toolkit.Nvcc(tmp_path, tmp_path, (13, 0), frozenset({80, 90}))
    monkeypatch.setattr(cuda_toolkit, "find", lambda: nvcc)
    found = read(stores=8)
    monkeypatch.setattr(compile_cuda, "build", lambda *_: [compile_cuda.Kernel(**vars(kernel)) for kernel in found])
    out = tmp_path / "kernels.json"
    assert compile_cuda.main(["--only", "fold.cu", "--arch", "90", "--arch", "120", "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert "WRONG even(float*) (kernels.cu) on sm_90 spills 8 bytes" in said or "WRONG _Z4evenPf" in said
    assert "nvcc 13.0 does not know sm_120" in said
    written = json.loads(out.read_text())
    assert written["nvcc"] == "13.0" and [kernel["spilled"] for kernel in written["kernels"]] == [8, 0]
    found = read()
    assert compile_cuda.main(["--only", "fold.cu", "--arch", "90"]) == 0


def test_what_nvcc_makes_of_a_kernel_is_read(tmp_path: Path) -> None:
    try:
        nvcc = cuda_toolkit.find()
    except cuda_toolkit.ToolkitError as error:
        pytest.skip(str(error))
    (tmp_path / "twice.cu").write_text(
        "__global__ void __launch_bounds__(128, 4) twice(float *x) {\n"
        "  __shared__ float kept[128];\n"
        "  kept[threadIdx.x] = 2 * x[threadIdx.x];\n"
        "  __syncthreads();\n"
        "  x[threadIdx.x] = kept[127 - threadIdx.x];\n"
        "}\n"
    )
    (kernel,) = compile_cuda.build(nvcc.path, tmp_path / "twice.cu", 90)
    assert (kernel.source, kernel.architecture, kernel.most_registers) == ("twice.cu", 90, 128)
    assert kernel.shared >= 512 and 0 < kernel.registers <= 128 and not kernel.trouble
    (tmp_path / "wrong.cu").write_text("int main( {}\n")
    with pytest.raises(RuntimeError, match=r"wrong.cu does not compile for sm_90:\n(.|\n)*error"):
        compile_cuda.build(nvcc.path, tmp_path / "wrong.cu", 90)
