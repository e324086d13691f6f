"""Builds `racecar_kernels._C` and `racecar_kernels._CUDA` where it can; everything else is in pyproject.toml.

Both are compiled against the installed PyTorch, which a build in isolation cannot see:

    pip install --no-build-isolation .        # with them
    pip install .                             # without them, unless PyTorch can be imported at build time

PyTorch is not listed as a build requirement on purpose: pip would fetch gigabytes to compile against a PyTorch that
may not be the one the package then runs with. Either module is built without the other one.

`RACECAR_BUILD_CPP`, `RACECAR_BUILD_CUDA`: `auto` (default: build it where that works, and say in one line why not),
`0` (never), `1` (a failure to build it is an error). `TORCH_CUDA_ARCH_LIST`, `CUDA_HOME`, `MAX_JOBS` as everywhere.
`RACECAR_SANITIZE=1`: build `_C` with AddressSanitizer and UBSan, for `make sanitize` alone: it then loads only where
libasan was there first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

SANITIZE = "RACECAR_SANITIZE"
CPP, CUDA = "racecar_kernels._C", "racecar_kernels._CUDA"
SWITCH = {CPP: "RACECAR_BUILD_CPP", CUDA: "RACECAR_BUILD_CUDA"}
NEEDED = {CPP: "PyTorch and a C++ compiler", CUDA: "a CUDA build of PyTorch, nvcc of its CUDA and a C++ compiler"}

# By its path: importing the package would import PyTorch.
_spec = importlib.util.spec_from_file_location("cuda_toolkit", Path("racecar_kernels/cuda_toolkit.py"))
cuda_toolkit = importlib.util.module_from_spec(_spec)  # type: ignore[arg-type]
_spec.loader.exec_module(cuda_toolkit)  # type: ignore[union-attr]


def switch(name: str) -> str:
    value = os.environ.get(SWITCH[name], "").strip().lower() or "auto"  # set to nothing is not set
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{SWITCH[name]} is auto, 0 or 1, got {value!r}")
    return value


def say(line: str) -> None:
    print(f"racecar-kernels: {line}", file=sys.stderr, flush=True)


def not_built(name: str, reason: str) -> None:
    """Says so in one line and goes on, or stops where the module was asked for."""
    how = f"To build it, with {NEEDED[name]} installed: pip install --no-build-isolation ."
    reason = f"{name} is not built: {' '.join(reason.split())[:400]}. {how}"
    if switch(name) == "1":
        raise SystemExit(reason)
    say(reason)


def compiler_flags() -> list[str]:
    """Without -std, which PyTorch adds, and -march: the kernels choose their instructions at run time.

    -fno-math-errno and -fno-trapping-math let selects and comparisons vectorise, and change no result.
    """
    if sys.platform != "linux":
        return []
    common = ["-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    if os.environ.get(SANITIZE, "0") != "1":
        return ["-O3", "-g0", *common]
    # UBSan stops at its first finding, as AddressSanitizer does. Python's own flags hold -fwrapv, under which a signed
    # overflow is no error; the frame pointers make the report's stack readable.
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-wrapv"]
    return ["-O1", "-g", "-fno-omit-frame-pointer", *checks, *common]


def files(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


def cpp_extension(build: Any) -> Extension:
    flags = compiler_flags()
    return build.CppExtension(
        CPP,
        files("*.cpp"),
        depends=files("*.h", "*.inl"),
        extra_compile_args=flags,
        extra_link_args=[flag for flag in flags if flag.startswith(("-fopenmp", "-fsanitize"))],
        define_macros=[("RACECAR_FLAGS", f'"{" ".join(flags)}"')],
    )


def cuda_extension(build: Any) -> Extension:
    """Raises ToolkitError, with the reason, where the CUDA kernels cannot be compiled and linked."""
    import torch

    if sys.platform != "linux":
        raise cuda_toolkit.ToolkitError(f"the CUDA kernels are built on Linux, this is {sys.platform}")
    if torch.version.cuda is None:
        raise cuda_toolkit.ToolkitError(f"this PyTorch, {torch.__version__}, is built without CUDA")
    nvcc = cuda_toolkit.find()
    version = ".".join(map(str, nvcc.version))
    if nvcc.version[0] != int(torch.version.cuda.split(".")[0]):
        raise cuda_toolkit.ToolkitError(
            f"nvcc is of CUDA {version}, but PyTorch {torch.__version__} is built with CUDA {torch.version.cuda}"
        )
    if not (nvcc.home / "include" / "cuda_runtime_api.h").is_file():
        raise cuda_toolkit.ToolkitError(f"{nvcc.home} has a compiler, but no include/cuda_runtime_api.h")
    codes = cuda_toolkit.codes(nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    build.CUDA_HOME = str(nvcc.home)  # PyTorch takes the folder above the one on PATH, which may hold but a link
    module = build.CUDAExtension(
        CUDA,
        files("cuda/*.cpp", "cuda/*.cu"),
        depends=files("*.h", "*.inl", "cuda/*.h", "cuda/*.cuh"),
        extra_compile_args={"cxx": ["-O3", "-g0"], "nvcc": ["-O3", *cuda_toolkit.flags(codes)]},
        extra_link_args=[str(cuda_runtime(nvcc, torch.version.cuda))],
        define_macros=[("RACECAR_CODES", f'"{",".join(codes)}"')],
    )
    module.libraries.remove("cudart")  # named by its path instead: see there
    say(f"{CUDA} is built by nvcc {version} for {', '.join(codes)}")
    return module


def cuda_runtime(nvcc: Any, version: str) -> Path:
    """libcudart, of the toolkit or, where that is a compiler alone, the one that came with PyTorch.

    What is linked is its name with the major version, which PyTorch has loaded by the time this module is.
    """
    import torch

    major = version.split(".")[0]
    beside = Path(torch.__file__).parent.parent / "nvidia"
    folders = [
        nvcc.home / "lib64",
        nvcc.home / "lib",
        *(beside / f"{part}/lib" for part in (f"cu{major}", "cuda_runtime")),
    ]
    for path in (folder / name for folder in folders for name in ("libcudart.so", f"libcudart.so.{major}")):
        if path.is_file():
            return path
    raise cuda_toolkit.ToolkitError(f"no libcudart.so was found in {', '.join(map(str, folders))}")


def extensions() -> dict[str, Any]:
    """Arguments for `setup` that build the modules, or none."""
    wanted = [name for name in SWITCH if switch(name) != "0"]
    for name in SWITCH.keys() - wanted:
        not_built(name, f"{SWITCH[name]}=0")
    if not wanted:
        return {}
    try:
        from torch.utils import cpp_extension as build
    except Exception as error:  # a broken PyTorch raises OSError for a missing library, and others
        for name in wanted:
            not_built(name, f"PyTorch cannot be imported at build time: {error}")
        return {}
    os.environ["MAX_JOBS"] = str(cuda_toolkit.jobs())  # its own number, unless that is none
    # ninja is looked for on PATH, which an environment that was not activated is not on
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    class BuildEachOrSkip(build.BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            """Builds one after the other: what fails with one of them must not take the other one along."""
            for name in SWITCH:  # of an earlier build: a wheel holds whatever lies here
                Path(self.build_lib, self.get_ext_filename(name)).unlink(missing_ok=True)
            built, before = [], (self.compiler, self.inplace)
            for module in self.extensions:
                self.extensions, (self.compiler, self.inplace) = [module], before
                try:
                    super().run()
                    built.append(module)
                except Exception as error:  # ninja, the compiler and the linker each fail in their own way
                    not_built(module.name, f"compiling failed: {error}")
            self.extensions = built  # so that nothing is copied from where it was not built

    modules = []
    for name, make in ((CPP, cpp_extension), (CUDA, cuda_extension)):
        try:
            modules += [make(build)] if name in wanted else []
        except cuda_toolkit.ToolkitError as error:
            not_built(name, str(error))
        except Exception as error:  # PyTorch's own look at compilers and toolkits raises what it likes
            not_built(name, f"{type(error).__name__}: {error}")
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildEachOrSkip}}


setup(license="Apache-2.0", **extensions())
