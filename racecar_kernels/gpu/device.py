"""What the launchers ask of the device: whether Triton runs there, its architecture and its multiprocessors."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

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
