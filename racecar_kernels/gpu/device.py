"""What the launchers ask of the device: whether Triton runs there, its architecture and its multiprocessors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # sm_80: bfloat16 in the matrix units


class Device(NamedTuple):
    """What a table of configs is looked up by."""

    architecture: str  # sm_80, sm_90, ...
    multiprocessors: int


# Whether Triton's interpreter stands in for a GPU: kernels then run, slowly, on CPU tensors. The tests set it; the
# environment needs TRITON_INTERPRET=1 before Triton is imported.
INTERPRETED = False
INTERPRETER = Device("sm_90", 4)  # few programs, so that each of them has several tiles


def why_not(kind: str) -> str | None:
    """None where Triton kernels run on a device of this kind ("cuda", "cpu", ...), else a sentence."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; to install it: pip install triton"
    if kind == "cpu":
        return None if INTERPRETED else "the Triton kernels run on a GPU, got tensors on cpu"
    if kind != "cuda":
        return f"the Triton kernels run on NVIDIA GPUs, got tensors on {kind}"
    if torch.version.hip is not None:
        return "the Triton kernels are tuned and tested for NVIDIA GPUs, this is one of AMD's"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        major, minor = torch.cuda.get_device_capability()
        return f"the Triton kernels need a GPU from sm_{OLDEST[0]}{OLDEST[1]} on, this one is sm_{major}{minor}"
    return None


def why_not_tensors(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> str | None:
    """None where the kernels serve these tensors, of one type, and `others` beside them; else a sentence."""
    first = tensors[0]
    reason = why_not(first.device.type)
    if reason is not None:
        return reason
    every = (*tensors, *others)
    if any(t.device != first.device for t in every):
        return f"the tensors are on several devices: {listed(t.device for t in every)}"
    if first.dtype not in DTYPES or any(t.dtype != first.dtype for t in tensors):
        return f"one type of {listed(DTYPES)} is needed, got {listed(t.dtype for t in tensors)}"
    return None


def listed(values: Iterable[object]) -> str:
    """Each value once, with commas between them."""
    return ", ".join(dict.fromkeys(map(str, values)))


def of(t: Tensor) -> Device:
    """The device that t is on."""
    return _cuda(t.device.index or 0) if t.device.type == "cuda" else INTERPRETER


def current() -> Device:
    """The device on which work is done where no tensor says otherwise."""
    return _cuda(torch.cuda.current_device()) if torch.cuda.is_available() else INTERPRETER


@lru_cache
def _cuda(index: int) -> Device:
    own = torch.cuda.get_device_properties(index)
    return Device(f"sm_{own.major}{own.minor}", own.multi_processor_count)
