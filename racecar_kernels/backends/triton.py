"""The Triton backend on NVIDIA GPUs: the kernels of `racecar_kernels.gpu` around cuDNN's convolutions."""

from __future__ import annotations

import torch

from ..contract import Query
from ..gpu import device
from ..pointwise import Family
from .pointwise_layer import PointwiseLayer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels() -> Family:
    """The pointwise family; Triton is imported here, at the first use."""
    from ..gpu.pointwise import KERNELS

    return KERNELS


LAYER = PointwiseLayer(kernels)


def why_not(query: Query) -> str | None:
    """None where the kernels serve this layer, else a sentence that says why not."""
    reason = device.why_not(query.device)
    if reason is not None:
        return reason
    if query.dtype not in DTYPES:
        return f"the Triton kernels serve {', '.join(map(str, DTYPES))}, got {query.dtype}"
    return None
