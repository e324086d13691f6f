"""Opt-in tuning: measures the shipped configs of what a program launches, and keeps the best in a file of the user's.

    with racecar_kernels.autotune("tuned.json"):  # or RACECAR_TUNE=tuned.json for the whole process
        train(...)                                # some steps
    RACECAR_TUNED=tuned.json                      # later runs start from what was found

The first launch of a shape class (`configs.candidates` has its name) is repeated with every candidate. Nothing is
measured while a CUDA graph is captured or torch.compile traces, and only what is compiled ahead of time is ever tried.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..tape import one_instruction
from . import configs, device

Entries = dict[str, tuple[int, ...]]
P = ParamSpec("P")
R = TypeVar("R")


class Tuner:
    """Measures what is new, and writes the file after every shape class."""

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir() or path.is_dir():
            raise ValueError(f"configs are written to a file in a folder that exists, got {os.fspath(path)!r}")
        self.path, self.architecture = path, _architecture()
        self.entries = read(path, self.architecture) if path.exists() else {}
        self.lock, self.busy = threading.RLock(), False
        configs.overlay(self.architecture, self.entries)

    def run(self, launch: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The launch's result, with the configs known so far. What it was first to look up is then measured."""
        with self.lock:  # backward passes run in threads of their own
            if self.busy:  # a launch within a measured one
                return launch(*args, **kwargs)
            configs.overlay(self.architecture, self.entries)  # forgets what other launches have looked up
            result = launch(*args, **kwargs)
            asked = configs.asked(self.architecture)
            new = [name for name in asked if name not in self.entries and len(asked[name]) > 1]
            if new:
                self.busy = True
                try:
                    self._tune(launch, args, kwargs, {name: asked[name] for name in new})
                finally:
                    self.busy = False
                    configs.overlay(self.architecture, self.entries)
            return result

    def _tune(self, launch: Any, args: Any, kwargs: Any, new: dict[str, list[Any]]) -> None:
        if launch.__name__.endswith("_") or kwargs.get("in_place"):
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        for name, candidates in new.items():
            times = []
            for candidate in candidates:  # the static one first: it stays unless another is quicker
                configs.overlay(self.architecture, {**self.entries, name: candidate})
                try:
                    times.append(milliseconds(lambda: launch(*args, **kwargs)))
                except RuntimeError:  # no memory for it, or too few registers on this chip: not the one
                    times.append(float("inf"))
            if min(times) == float("inf"):
                continue
            self.entries[name] = tuple(candidates[times.index(min(times))])
            write(self.path, self.architecture, self.entries)


_tuner: Tuner | None = None


@contextlib.contextmanager
def autotune(path: str | os.PathLike[str]) -> Iterator[None]:
    """Measures every shape class that is launched inside, and keeps the quickest config in the JSON file `path`.

    A file that exists is added to. What was found stays in effect in this process.

    Raises:
        ValueError: the file is damaged, was made on another architecture, or is in no folder.
    """
    global _tuner
    before, _tuner = _tuner, Tuner(Path(path))
    try:
        yield
    finally:
        _tuner = before


def launcher(launch: Callable[P, R]) -> Callable[P, R]:
    """A function that launches kernels: on the device of its first tensor, and measured while `autotune` is active."""

    @functools.wraps(launch)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _read_environment()
        first = _first_tensor((*args, *kwargs.values()))
        on_gpu = first is not None and first.is_cuda
        with torch.cuda.device_of(first) if on_gpu else contextlib.nullcontext():
            if _tuner is None or _is_recorded():
                return launch(*args, **kwargs)
            return _tuner.run(launch, *args, **kwargs)

    return one_instruction(call)


def read(path: Path, architecture: str) -> Entries:
    """The entries of a file. Raises ValueError where it is damaged or of another architecture."""
    try:
        table = json.loads(path.read_text("utf-8"))
        made_on, given = table["architecture"], dict(table["configs"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no table of tuned configs ({e!r}); delete it and tune again") from e
    if made_on != architecture:
        raise ValueError(f"{path} was tuned on {made_on}, this device is {architecture}; tune into another file")
    for name, values in given.items():
        try:
            known = [list(c) for c in configs.candidates(name, architecture)]
        except (KeyError, ValueError):
            known = []
        if values not in known:
            raise ValueError(f"{path} names {values} for {name!r}, which is not shipped; delete it and tune again")
    return {name: tuple(values) for name, values in given.items()}


def write(path: Path, architecture: str, entries: Entries) -> None:
    """Whole or not at all."""
    import triton

    table = {"architecture": architecture, "triton": triton.__version__, "torch": torch.__version__, "configs": entries}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        json.dump(table, file, indent=1)
    os.replace(file.name, path)


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time on the device, by CUDA events and with a cold cache."""
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))


@functools.lru_cache(maxsize=1)
def _read_environment() -> None:
    """RACECAR_TUNED and RACECAR_TUNE, at the first launch: no architecture is known before."""
    global _tuner
    if tuned := os.environ.get("RACECAR_TUNED"):
        configs.overlay(_architecture(), read(Path(tuned), _architecture()))
    if tune := os.environ.get("RACECAR_TUNE"):
        _tuner = _tuner or Tuner(Path(tune))


def _architecture() -> str:
    return device.current().architecture


def _is_recorded() -> bool:
    """Whether what runs is being recorded: then nothing can be timed."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _first_tensor(value: Any) -> Tensor | None:
    """The first tensor among arguments, some of which are tuples that begin with one."""
    while isinstance(value, tuple):
        value = next((v for v in value if v is not None), None)
    return value if isinstance(value, Tensor) else None
