"""The table of backends, in order of preference. The first one without a reason against it serves a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import extension, pointwise, reference
from ..contract import Call, Grads, Needs, Params, State
from ..contract import Query as Query
from ..layer import Layer, Tied
from ..pointwise import Family
from . import cpp, triton
from .pointwise_layer import PointwiseLayer


@dataclass(frozen=True)
class Backend:
    """One implementation of a reverse layer; see `contract.py` for what the three functions do.

    `why_not(query)` is None if the backend serves this layer, else a sentence that says why it does not. `kernels()`
    is what a chain is made of, the three functions are a reverse layer by itself. `way(weight, operation)`: how a layer
    is computed, where there are several ways.
    """

    name: str
    summary: str
    why_not: Callable[[Query], str | None]
    kernels: Callable[[], Family]
    forward: Callable[[Call], tuple[State, Tensor | None, Tensor]]
    resume: Callable[[Layer, Tensor, Params], State]
    backward: Callable[[Call, State, Tensor | None, Tensor | None, Needs], Grads]
    way: Callable[[Tensor, Tied], str] | None = None


def _reference_why_not(query: Query) -> str | None:
    return None


TABLE: tuple[Backend, ...] = (
    Backend(
        "cpp",
        "C++ kernels around PyTorch's convolutions, CPU, float32, float64 and bfloat16",
        cpp.why_not,
        cpp.LAYER.kernels,
        cpp.LAYER.forward,
        cpp.LAYER.resume,
        cpp.LAYER.backward,
    ),
    Backend(
        "triton",
        "Triton kernels around cuDNN's convolutions, NVIDIA GPU, float32 to float16, not yet measured on a GPU",
        triton.why_not,
        triton.LAYER.kernels,
        triton.LAYER.forward,
        triton.LAYER.resume,
        triton.LAYER.backward,
        partial(triton.way, "measured"),
    ),
    Backend(
        "reference",
        "plain PyTorch, any device, float64 to bfloat16",
        _reference_why_not,
        lambda: pointwise.PLAIN,
        reference.forward,
        reference.resume,
        reference.backward,
    ),
)


def _of_triton(
    name: str, summary: str, layer: PointwiseLayer, why_not: Callable[[Query], str | None] = triton.why_not
) -> Backend:
    functions = (layer.kernels, layer.forward, layer.resume, layer.backward)
    return Backend(name, summary, why_not, *functions, partial(triton.way, name.removeprefix("triton:")))


# Never chosen, but to be asked for by name, in one call or in `wrap`.
ON_REQUEST: tuple[Backend, ...] = (
    _of_triton("triton:fused", "every convolution that a fused kernel serves in that kernel", triton.FUSED),
    _of_triton("triton:library", "every convolution by cuDNN, with a pointwise kernel behind it", triton.LIBRARY),
    _of_triton(
        "cuda",
        "few channels and narrow linear chains in CUDA kernels, the rest as triton, not yet measured on a GPU",
        triton.CUDA,
        triton.why_not_cuda,
    ),
)


def backends(*, on_request: bool = False) -> tuple[str, ...]:
    """Names of the backends, in order of preference; with `on_request` also of those that are never chosen."""
    return tuple(b.name for b in (*TABLE, *(ON_REQUEST if on_request else ())))


def by_name(name: str) -> Backend:
    """The backend called `name`. Raises ValueError with the names there are."""
    for backend in (*TABLE, *ON_REQUEST):
        if backend.name == name:
            return backend
    names = ", ".join(backends(on_request=True))
    raise ValueError(f"there is no backend {name!r}; backend must be None or one of {names}")


def why_not(name: str, query: Query) -> str | None:
    """Why the backend `name` cannot serve `query`, as a sentence; None if it can."""
    return by_name(name).why_not(query)


def choose(query: Query, forced: str | None = None) -> Backend:
    """The first backend that serves `query`, or the forced one. Raises ValueError if that one cannot."""
    if not torch.compiler.is_compiling():
        extension.warn_once(extension.CPP)  # this is where it is used, or not
    if forced is None:
        return next(b for b in TABLE if b.why_not(query) is None)
    backend = by_name(forced)
    reason = backend.why_not(query)
    if reason is not None:
        raise ValueError(f"backend {forced!r} cannot serve this layer: {reason}")
    return backend
