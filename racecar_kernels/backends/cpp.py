"""The C++ backend on the CPU: the kernels of csrc/ around PyTorch's own convolutions."""

from __future__ import annotations

from .. import extension
from ..contract import Query
from ..pointwise import DTYPES, KERNELS
from .pointwise_layer import PointwiseLayer

LAYER = PointwiseLayer(lambda: KERNELS)


def why_not(query: Query) -> str | None:
    """None where the kernels serve this layer, else a sentence that says why not."""
    if query.device != "cpu":
        return f"the C++ kernels run on the CPU, got tensors on {query.device}"
    if query.dtype not in DTYPES:
        return f"the C++ kernels serve {', '.join(map(str, DTYPES))}, got {query.dtype}"
    return extension.why_not(warn=False)
