"""The table of backends, in order of preference. The first one without a reason against it serves a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..contract import Call, Grads, Needs, Params, State
from ..layer import Layer


@dataclass(frozen=True)
class Query:
    """What a backend is asked to serve."""

    layer: Layer
    device: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Backend:
    """One implementation of a reverse layer; see `contract.py` for what the three functions do.

    `why_not(query)` is None if the backend serves this layer, else a sentence that says why it does not.
    """

    name: str
    summary: str
    why_not: Callable[[Query], str | None]
    forward: Callable[[Call], tuple[State, Tensor | None, Tensor]]
    resume: Callable[[Layer, Tensor, Params], State]
    backward: Callable[[Call, State, Tensor | None, Tensor | None, Needs], Grads]


def _reference_why_not(query: Query) -> str | None:
    return None


TABLE: tuple[Backend, ...] = (
    Backend(
        "reference",
        "plain PyTorch, any device, float64 to bfloat16",
        _reference_why_not,
        reference.forward,
        reference.resume,
        reference.backward,
    ),
)


def backends() -> tuple[str, ...]:
    """Names of the backends, in order of preference."""
    return tuple(b.name for b in TABLE)


def by_name(name: str) -> Backend:
    """The backend called `name`. Raises ValueError with the names there are."""
    for backend in TABLE:
        if backend.name == name:
            return backend
    raise ValueError(f"there is no backend {name!r}; backend must be None or one of {', '.join(backends())}")


def why_not(name: str, query: Query) -> str | None:
    """Why the backend `name` cannot serve `query`, as a sentence; None if it can."""
    return by_name(name).why_not(query)


def choose(query: Query, forced: str | None = None) -> Backend:
    """The first backend that serves `query`, or the forced one. Raises ValueError if that one cannot."""
    if forced is None:
        return next(b for b in TABLE if b.why_not(query) is None)
    backend = by_name(forced)
    reason = backend.why_not(query)
    if reason is not None:
        raise ValueError(f"backend {forced!r} cannot serve this layer: {reason}")
    return backend
