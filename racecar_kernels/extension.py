"""Finds the compiled extension, and keeps the sentence that explains why it is not used.

The package works without the extension: whoever wants it calls `load` and gets the module or None, and `why_not`
answers the question that follows. Importing the package says nothing and loads nothing. An extension that is there but
refused makes the package slower than its user expects, so the first use warns, once; one that was never built does not.
"""

from __future__ import annotations

import functools
import importlib
import struct
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = ["load", "why_not"]

NAME = "racecar_kernels._C"
REBUILD = "in the source folder: pip install --no-build-isolation --no-deps --force-reinstall ."
FOLDER = Path(__file__).parent


class _Found(NamedTuple):
    module: ModuleType | None
    reason: str | None = None
    refused: bool = False  # it is there and is not used


def load() -> ModuleType | None:
    """The extension module, or None where it is missing or does not fit the running PyTorch. Imported once."""
    warn_once()
    return _found().module


@torch.compiler.assume_constant_result  # so that torch.compile need not trace an import
def why_not(*, warn: bool = True) -> str | None:
    """None where the extension is in use, else a sentence that says what failed and how to rebuild it.

    warn: give an extension that is refused its one warning; for those who show the sentence anyway, False.
    """
    if warn:
        warn_once()
    return _found().reason


@functools.cache
def warn_once() -> None:
    """Tells, the first time, of an extension that is there and refused."""
    found = _found()
    if found.refused:
        warnings.warn(
            f"racecar_kernels: the compiled extension is {found.reason} Until then plain PyTorch does its work.",
            RuntimeWarning,
            stacklevel=3,
        )


def forget() -> None:
    """Looks for it anew at the next call: it may have been built since."""
    _found.cache_clear()


@functools.cache
def _found() -> _Found:
    path = FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if path.exists() and (cut := _cut_off(path)):  # asked first: loading such a file can kill the process
        return _refusal(cut)
    try:
        module = importlib.import_module(NAME)
    except ModuleNotFoundError as error:
        if error.name != NAME:
            return _refusal(f"it needs a module that is missing: {error}")
        return _missing(path)
    except ImportError as error:  # the text names the file, and the symbol or the library that is missing
        if "undefined symbol" in str(error):
            return _refusal(f"it was most likely built for another PyTorch than {torch.__version__}: {error}")
        return _refusal(f"it cannot be loaded: {error}")
    except Exception as error:  # raised by its own initialisation, in whatever way
        return _refusal(f"its initialisation failed: {type(error).__name__}: {error}")
    return _checked(module)


def _missing(path: Path) -> _Found:
    others = sorted(file.name for file in FOLDER.glob("_C.*") if file.suffix in (".so", ".pyd"))
    if others:
        return _refusal(f"this Python loads {path.name}, but there is {', '.join(others)}")
    return _Found(None, f"not built; to build it, {REBUILD}")


def _cut_off(path: Path) -> str | None:
    """What is missing of an ELF file (Linux): its last part is the table of sections, whose place the header tells."""
    header, size = path.read_bytes()[:64], path.stat().st_size
    if header[:4] != b"\x7fELF" and size >= 64:
        return None  # another format, or none; the loader has its own sentence for that
    needed = 64
    if len(header) == 64 and header[4:6] == b"\x02\x01":  # 64 bits, little-endian
        table, entry, entries = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
        needed = max(needed, table + entry * entries)
    return f"{path.name} is cut off: {size} bytes of at least {needed}" if size < needed else None


def _checked(module: ModuleType) -> _Found:
    """An extension can load and still disagree with PyTorch's classes: only the version it was built for is safe."""
    try:
        built = str(module.build_facts()["torch"])
    except (AttributeError, KeyError, TypeError) as error:
        return _refusal(f"it does not say which PyTorch it was built for ({type(error).__name__}: {error})")
    running = torch.__version__.split("+")[0]
    if built == running:
        return _Found(module)
    return _refusal(f"it was built for PyTorch {built}, but {running} is running")


def _refusal(reason: str) -> _Found:
    return _Found(None, f"not used: {' '.join(reason.split())}. To rebuild it, {REBUILD}", refused=True)
