"""The Triton backend on NVIDIA GPUs: the kernels of `racecar_kernels.gpu` around cuDNN's convolutions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..contract import Query
from ..gpu import device
from ..layer import Tied
from ..pointwise import Family
from .pointwise_layer import PointwiseLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels(way: str = "measured") -> Family:
    """The pointwise family; Triton is imported here, at the first use.

    way: `library` leaves every convolution to cuDNN, `fused` takes a fused kernel wherever one serves, `measured` where
    it was the faster one on this GPU (`gpu/chooser.py`).
    """
    from ..gpu import chooser
    from ..gpu.pointwise import KERNELS

    if way == "library" or (way == "measured" and not chooser.MEASURED):
        return KERNELS
    return KERNELS._replace(fused=chooser.fused(chooser.always if way == "fused" else chooser.measured))


def way(how: str, weight: Tensor, tied: Tied) -> str:
    """How a layer's convolutions are computed, for a plan."""
    from ..gpu import chooser

    if how == "library" or device.why_not(weight.device.type) is not None:
        return "library"
    return chooser.way(weight, tied, chooser.always if how == "fused" else chooser.measured)


LAYER = PointwiseLayer(kernels)
FUSED, LIBRARY = PointwiseLayer(partial(kernels, "fused")), PointwiseLayer(partial(kernels, "library"))


def why_not(query: Query) -> str | None:
    """None where the kernels serve this layer, else a sentence that says why not."""
    reason = device.why_not(query.device)
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"the Triton kernels serve {', '.join(map(str, DTYPES))}, got {query.dtype}"
    return None
