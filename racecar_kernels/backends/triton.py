"""The Triton backend on NVIDIA GPUs: the kernels of `racecar_kernels.gpu` around cuDNN's convolutions."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..contract import Query
from ..fused import Fused, joined
from ..gpu import device
from ..layer import Tied
from ..pointwise import Family
from .pointwise_layer import PointwiseLayer


def forms(how: str) -> dict[str, Fused]:
    """What computes a convolution with everything around it, by name; what none of them takes is cuDNN's.

    how: `library` takes none of them, `fused` the fused Triton kernel wherever it serves, `cuda` the CUDA kernel
    wherever that serves; that, and `measured`, whichever was the fastest on this GPU (`gpu/chooser.py`).
    """
    from ..cuda import few_channels
    from ..gpu import chooser
    from ..gpu.pointwise import KERNELS

    if how == "library":
        return {}
    if how == "fused":
        return {"fused": chooser.fused(chooser.always)}
    wanted = None if how == "cuda" else partial(chooser.is_fastest, form="cuda")
    return {"cuda": few_channels.fused(wanted, KERNELS), "fused": chooser.fused(chooser.is_fastest)}


def kernels(how: str = "measured") -> Family:
    """The pointwise family, with `forms(how)`; Triton is imported here, at the first use."""
    from ..gpu import chooser
    from ..gpu.pointwise import KERNELS

    if how == "library" or (how == "measured" and not chooser.MEASURED):
        return KERNELS
    return KERNELS._replace(fused=joined(list(forms(how).values())))


def way(how: str, weight: Tensor, tied: Tied) -> str:
    """How a layer's convolutions are computed, for a plan."""
    from ..gpu import chooser

    return "library" if device.why_not(weight.device.type) is not None else chooser.way(weight, tied, forms(how))


LAYER = PointwiseLayer(kernels)
FUSED, LIBRARY = PointwiseLayer(partial(kernels, "fused")), PointwiseLayer(partial(kernels, "library"))
CUDA = PointwiseLayer(partial(kernels, "cuda"))


def why_not(query: Query) -> str | None:
    """None where the kernels serve this layer, else a sentence that says why not."""
    reason = device.why_not(query.device)
    if reason is not None:
        return reason
    if query.dtype not in device.DTYPES:
        return f"the Triton kernels serve {device.listed(device.DTYPES)}, got {query.dtype}"
    return None


def why_not_cuda(query: Query) -> str | None:
    """The same of the backend `cuda`, which needs the compiled module besides, and a GPU and a driver that run it."""
    from ..cuda import few_operands

    return why_not(query) or few_operands.why_not_device(query.device)
