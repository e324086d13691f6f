"""Memory formats, as PyTorch's convolutions see them in strides."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format


def memory_format_of(t: Tensor) -> torch.memory_format:
    """channels_last (2d or 3d) or contiguous. Strides are asked, not sizes: with one channel those leave it open."""
    if type(t) in (Tensor, nn.Parameter):  # sizes and strides that are numbers: asked once
        try:
            return _of(tuple(t.shape), t.stride())
        except TypeError:  # symbolic numbers inside a plain tensor, while it is being traced
            pass
    return suggest_memory_format(t)


@lru_cache(maxsize=4096)
def _of(shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.memory_format:
    return suggest_memory_format(torch.empty_strided(shape, stride, device="meta"))
