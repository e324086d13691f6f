"""The CUDA kernels on the CPU: their own source, compiled for the host (csrc/cuda/portable.cuh), called by ctypes.

`compiled("fold")` is tests/cuda_sources/fold.cpp as a library. With RACECAR_SANITIZE_HOST=1 it is built with
AddressSanitizer and UBSan, and then loads only where libasan was there first (`make sanitize`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from racecar_kernels.cuda.parameters import FewParams
from racecar_kernels.cuda.tiles import MOST_SHARED
from racecar_kernels.layout import memory_format_of

FOLDER = Path(__file__).parent / "cuda_sources"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fno-math-errno")
CHECKED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
IN_ORDER, LAST_FIRST, ALONE = range(3)  # HostThreads of csrc/cuda/host_launch.h

NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The kernels' types, as `Number` of portable.cuh counts them."""


@functools.cache
def _built() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="racecar-cuda-host-")


@functools.cache
def compiled(name: str) -> ctypes.CDLL:
    """tests/cuda_sources/`name`.cpp, compiled once in a process. Skips where there is no C++ compiler."""
    library = Path(_built().name) / f"{name}.so"
    compile_library(name, library, *(CHECKED if os.environ.get("RACECAR_SANITIZE_HOST") == "1" else ()))
    return ctypes.CDLL(str(library))


def compile_library(name: str, to: Path, *flags: str) -> None:
    """The same without loading it."""
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed")
    command = [*COMPILER.split(), *FLAGS, *flags, str(FOLDER / f"{name}.cpp"), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


@contextmanager
def threads(library: ctypes.CDLL, how: int) -> Iterator[None]:
    """Meanwhile the threads of a step run in this way; fails where two of them have changed one byte."""
    library.races.restype = ctypes.c_int64
    library.run_threads(how)
    try:
        yield
    finally:
        library.run_threads(IN_ORDER)
        raced = library.races()
    assert raced == 0, f"threads of one step have changed the same {raced} bytes of shared memory"


def call(function: Any, *args: Any) -> None:
    """Calls a function without a result: tensors are handed as their memory, tuples as arrays of 64-bit numbers."""
    function.restype = None
    function(*map(_handed, args))


def launch_few_channels(kernel: int, few: int, params: FewParams, like: Tensor) -> None:
    """In place of `few_operands.launch`."""
    library, number = compiled("few_channels"), NUMBERS[like.dtype]
    library.shared_bytes.restype = ctypes.c_int64
    assert library.shared_bytes(kernel, number, few, ctypes.byref(params)) <= MOST_SHARED
    library.few_channels(kernel, number, few, ctypes.byref(params))


class Folding:
    """In place of what `few_operands.folding` gives: `_CUDA` as it folds weights. Counts its calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def fold(self, weight: Tensor, factor: tuple[int, ...]) -> Tensor:
        self.calls["fold"] += 1
        return fold(weight, factor)

    def fold_adjoint(self, grad: Tensor, factor: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert grad.dtype == torch.float32
        self.calls["fold_adjoint"] += 1
        return fold(grad, factor, adjoint=True, dtype=dtype)


def fold(w: Tensor, factor: tuple[int, ...], *, adjoint: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """The kernel's result in the memory format of w, in memory that was NaN."""
    dtype = w.dtype if dtype is None else dtype
    grow = -1 if adjoint else 1
    size = (*w.shape[:2], *(k + grow * (f - 1) for k, f in zip(w.shape[2:], factor, strict=True)))
    out = torch.full(size, torch.nan, dtype=dtype).contiguous(memory_format=memory_format_of(w))
    call(
        compiled("fold").fold, NUMBERS[dtype], int(adjoint), w, tuple(w.shape), w.stride(), out, size, out.stride(),
        tuple(factor),
    )  # fmt: skip
    return out


def _handed(arg: Any) -> Any:
    if arg is None:
        return ctypes.c_void_p(None)
    if isinstance(arg, Tensor):
        assert arg.device.type == "cpu"
        return ctypes.c_void_p(arg.data_ptr())
    if isinstance(arg, tuple):
        return (ctypes.c_int64 * len(arg))(*arg)
    return ctypes.c_int64(arg) if isinstance(arg, int) else arg
