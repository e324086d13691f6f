"""Finds the compiled extension, and keeps the sentence that explains why it is not used.

The package works without the extension: whoever wants it calls `load` and gets the module or None, and `why_not`
answers the question that follows.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

__all__ = ["load", "why_not"]

NAME = "racecar_kernels._C"
REBUILD = "in the source folder: pip install --no-build-isolation --no-deps --force-reinstall ."


def load() -> ModuleType | None:
    """The extension module, or None where it is missing or does not fit the running PyTorch. Imported once."""
    return _found()[0]


@torch.compiler.assume_constant_result  # so that torch.compile need not trace an import
def why_not() -> str | None:
    """None where the extension is in use, else a sentence that says what failed and how to rebuild it."""
    return _found()[1]


@functools.cache
def _found() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(NAME)
    except ModuleNotFoundError as error:
        if error.name != NAME:
            return None, _refusal(f"it needs a module that is missing: {error}")
        return None, f"not built; to build it, {REBUILD}"
    except ImportError as error:  # an undefined symbol, a missing library: the text names it
        return None, _refusal(f"it was most likely built for another PyTorch than {torch.__version__}: {error}")
    return _checked(module)


def _checked(module: ModuleType) -> tuple[ModuleType | None, str | None]:
    """An extension can load and still disagree with PyTorch's classes: only the version it was built for is safe."""
    built = str(module.build_facts()["torch"])
    running = torch.__version__.split("+")[0]
    if built == running:
        return module, None
    return None, _refusal(f"it was built for PyTorch {built}, but {running} is running")


def _refusal(reason: str) -> str:
    return f"not used: {reason}. To rebuild it, {REBUILD}"
