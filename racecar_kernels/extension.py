"""Finds the compiled modules, and keeps the sentence that explains why one is not used.

There are two: `_C`, for the CPU (csrc/), and `_CUDA`, for NVIDIA GPUs (csrc/cuda/). The package works without them:
whoever wants one calls `load` and gets the module or None, and `why_not` answers the question that follows. Importing
the package says nothing and loads nothing. A module that is there but refused makes the package slower than its user
expects, so its first use warns, once; one that was never built does not.
"""

from __future__ import annotations

import functools
import importlib
import struct
import sysconfig
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import cuda_toolkit

__all__ = ["CPP", "CUDA", "load", "why_not", "why_not_on"]

CPP, CUDA = "_C", "_CUDA"
REBUILD = "in the source folder: pip install --no-build-isolation --no-deps --force-reinstall ."
FOLDER = Path(__file__).parent
INSTEAD = {CPP: "plain PyTorch does its work", CUDA: "Triton and plain PyTorch do its work"}
# What the package calls of each, to tell a module that was built from older sources.
NEEDED = {CPP: ("LinearChain", "Tape", "recordable", "serves"), CUDA: ("LinearChain", "few_channels", "fold")}
CALLED = {CPP: "compiled extension", CUDA: "compiled CUDA extension"}


class _Found(NamedTuple):
    module: ModuleType | None
    reason: str | None = None
    refused: bool = False  # it is there and is not used
    facts: dict[str, Any] | None = None  # how the module was built


class _Recording(threading.local):
    """Who records what this thread runs (`tape.py`), and what it is given in place of the extension meanwhile."""

    recorder: Any = None
    kernels: Any = None


_recording = _Recording()


def load(name: str = CPP, *, warn: bool = True) -> Any:
    """The module, or None where it is missing or does not fit the running PyTorch. Imported once.

    `CUDA` is loaded, and can be asked how it was built, without a GPU too: whether there is one, says `why_not`.
    warn: as for `why_not`.
    """
    if name == CPP and _recording.kernels is not None:
        return _recording.kernels
    if warn:
        warn_once(name)
    return _found(name).module


def recorder() -> Any:
    """Who records what this thread runs, or None."""
    return _recording.recorder


def never_replayed(why: str) -> None:
    """Said by what runs without being seen by who records."""
    if _recording.recorder is not None:
        _recording.recorder.refuse(why)


def recorded_by(recorder: Any, kernels: Any = None) -> None:
    """From now on this thread's `load` gives `kernels`. With None: the extension again."""
    _recording.recorder, _recording.kernels = recorder, kernels


@torch.compiler.assume_constant_result  # so that torch.compile need not trace an import
def why_not(name: str = CPP, *, warn: bool = True) -> str | None:
    """None where the module is in use, else a sentence that says what failed and how to rebuild it.

    name: `CPP`, or `CUDA`, which needs a GPU besides: the current one; `why_not_on` asks for another one.
    warn: give a module that is refused its one warning; for those who show the sentence anyway, False.
    """
    if warn:
        warn_once(name)
    reason = _found(name).reason
    return why_not_on(None) if reason is None and name == CUDA else reason


@functools.cache
def warn_once(name: str) -> None:
    """Tells, the first time, of a module that is there and refused."""
    found = _found(name)
    if found.refused:
        warnings.warn(
            f"racecar_kernels: the {CALLED[name]} is {found.reason} Until then {INSTEAD[name]}.",
            RuntimeWarning,
            stacklevel=3,
        )


def forget() -> None:
    """Looks for all of it anew at the next call: it may have been built since."""
    _found.cache_clear()
    _of_gpu.cache_clear()


@functools.cache
def _found(name: str) -> _Found:
    path = FOLDER / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    full = f"racecar_kernels.{name}"
    if path.exists() and (cut := _cut_off(path)):  # asked first: loading such a file can kill the process
        return _refusal(cut)
    if name == CUDA and torch.version.cuda is None:
        if path.exists():
            return _refusal(f"it was built for a PyTorch with CUDA; this one, {torch.__version__}, has none")
        return _Found(None, f"not built: this PyTorch, {torch.__version__}, is one without CUDA")
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            return _refusal(f"it needs a module that is missing: {error}")
        return _missing(path, name)
    except ImportError as error:  # the text names the file, and the symbol or the library that is missing
        if "undefined symbol" in str(error):
            return _refusal(f"it was most likely built for another PyTorch than {torch.__version__}: {error}")
        return _refusal(f"it cannot be loaded: {error}")
    except Exception as error:  # raised by its own initialisation, in whatever way
        return _refusal(f"its initialisation failed: {type(error).__name__}: {error}")
    return _checked(module, name)


def _missing(path: Path, name: str) -> _Found:
    if path.exists():
        return _refusal(f"{path.name} is no file")
    others = sorted(file.name for file in FOLDER.glob(f"{name}.*") if file.suffix in (".so", ".pyd"))
    if others:
        return _refusal(f"this Python loads {path.name}, but there is {', '.join(others)}")
    needs = "with nvcc and a C++ compiler, " if name == CUDA else ""
    return _Found(None, f"not built; to build it, {needs}{REBUILD}")


def _cut_off(path: Path) -> str | None:
    """What is missing of an ELF file (Linux): its last part is the table of sections, whose place the header tells."""
    try:
        with path.open("rb") as file:
            header, size = file.read(64), path.stat().st_size
    except OSError:  # a folder, or not to be read: what imports it says so
        return None
    if header[:4] != b"\x7fELF" and size >= 64:
        return None  # another format, or none; the loader has its own sentence for that
    needed = 64
    if len(header) == 64 and header[4:6] == b"\x02\x01":  # 64 bits, little-endian
        table, entry, entries = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
        needed = max(needed, table + entry * entries)
    return f"{path.name} is cut off: {size} bytes of at least {needed}" if size < needed else None


def _checked(module: ModuleType, name: str) -> _Found:
    """A module can load and still disagree with PyTorch's classes: only the version it was built for is safe."""
    try:
        facts = module.build_facts()
        built = str(facts["torch"])
        toolkit = facts["cuda"][0] if name == CUDA else None
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        return _refusal(f"it does not say which PyTorch it was built for ({type(error).__name__}: {error})")
    running = torch.__version__.split("+")[0]
    if built != running:
        return _refusal(f"it was built for PyTorch {built}, but {running} is running")
    cuda = torch.version.cuda
    if toolkit is not None and (cuda is None or toolkit != int(cuda.split(".")[0])):
        return _refusal(f"it was built for a PyTorch with CUDA {toolkit}, this one has {cuda or 'none'}")
    lacking = [needed for needed in NEEDED[name] if not hasattr(module, needed)]
    if lacking:
        return _refusal(f"it was built from other sources than these, and has no {', '.join(lacking)}")
    return _Found(module, facts=facts)


def _refusal(reason: str) -> _Found:
    return _Found(None, f"not used: {' '.join(reason.split())}. To rebuild it, {REBUILD}", refused=True)


@torch.compiler.assume_constant_result
def why_not_on(index: int | None) -> str | None:
    """Why `CUDA` cannot run on GPU number `index` (None: the current one), as a sentence; None if it can."""
    found = _found(CUDA)
    if found.module is None:
        return found.reason
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return _of_gpu(index)


@functools.cache
def _of_gpu(index: int | None) -> str | None:
    """index: of a GPU; None where PyTorch sees none. Asked for a module that was found."""
    facts = _found(CUDA).facts or {}
    (needed, _), codes = facts["cuda"], facts["codes"]
    driver = cuda_toolkit.driver_version()
    if driver is None:
        return "not used: no GPU is visible, and no NVIDIA driver is installed"
    if driver[0] < needed:  # within a major version an older driver serves
        newest = ".".join(map(str, driver))
        return f"not used: it needs a driver for CUDA {needed}, the one installed serves CUDA {newest} and older"
    if index is None:
        return "not used: no GPU is visible; is CUDA_VISIBLE_DEVICES set?"
    own = torch.cuda.get_device_capability(index)
    here = f"this one is sm_{own[0]}{own[1]}"
    if own < divmod(cuda_toolkit.OLDEST, 10):
        return f"not used: it needs a GPU from sm_{cuda_toolkit.OLDEST} on, {here}"
    if not cuda_toolkit.runs_on(codes, own):
        return f"not used: it was compiled for the GPUs {', '.join(codes)}, {here}. To rebuild it, {REBUILD}"
    return None
