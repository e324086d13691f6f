"""Builds `racecar_kernels._C` where it can; everything else is in pyproject.toml.

The extension is compiled against the installed PyTorch, which a build in isolation cannot see:

    pip install --no-build-isolation .        # with the extension
    pip install .                             # without it, unless PyTorch can be imported at build time

PyTorch is not listed as a build requirement on purpose: pip would fetch gigabytes to compile against a PyTorch that
may not be the one the package then runs with.

`RACECAR_BUILD_CPP`: `auto` (default: build it where that works), `0` (never), `1` (a failure to build it is an error).
`RACECAR_SANITIZE=1`: build it with AddressSanitizer and UBSan, for `make sanitize` alone: it then loads only where
libasan was there first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

SWITCH = "RACECAR_BUILD_CPP"
SANITIZE = "RACECAR_SANITIZE"
HOW_TO_BUILD = "with PyTorch and a C++ compiler installed: pip install --no-build-isolation ."


def switch() -> str:
    value = os.environ.get(SWITCH, "auto").lower()
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{SWITCH} is auto, 0 or 1, got {value!r}")
    return value


def not_built(reason: str) -> dict[str, Any]:
    """Says so in one line and goes on, or stops where the extension was asked for."""
    if switch() == "1":
        raise SystemExit(f"racecar_kernels._C was not built: {reason}. To build it, {HOW_TO_BUILD}")
    print(f"racecar-kernels: extension not built ({reason}). To build it, {HOW_TO_BUILD}", file=sys.stderr, flush=True)
    return {}


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


def extension() -> dict[str, Any]:
    """Arguments for `setup` that build the extension, or none."""
    if switch() == "0":
        return not_built(f"{SWITCH}=0")
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        return not_built(f"PyTorch cannot be imported at build time: {error}")

    class BuildOrSkip(cpp_extension.BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # ninja, the compiler and the linker each fail in their own way
                not_built(f"compiling failed: {' '.join(str(error).split())[:300]}")
                self.extensions = []  # so that nothing is copied from where it was not built

    flags = compiler_flags()
    module = cpp_extension.CppExtension(
        "racecar_kernels._C",
        sorted(map(str, Path("csrc").glob("*.cpp"))),
        depends=sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc").glob("*.inl")])),
        extra_compile_args=flags,
        extra_link_args=[flag for flag in flags if flag.startswith(("-fopenmp", "-fsanitize"))],
        define_macros=[("RACECAR_FLAGS", f'"{" ".join(flags)}"')],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildOrSkip}}


setup(license="Apache-2.0", **extension())
