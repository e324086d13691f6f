"""What the operators hand to a backend, and what they get back. To write a backend, read this.

A backend has three functions over one reverse layer:

    forward(call) -> (State, u or None, Σ (target - undo_pre(a))²)
    resume(layer, kept, params) -> State
    backward(call, state, grad_a, c, needs) -> Grads

One tensor is kept per layer between forward and backward: a where `keeps_output(layer)`, else u, which `forward` then
returns beside the state. `resume` makes the state again from it. c is twice the gradient of the sum of squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .activations import TABLE
from .layer import Activation, Layer, Step

Params = Sequence[Tensor | None]


class Call(NamedTuple):
    """The inputs of one reverse layer. `undo` has still to be applied to y."""

    layer: Layer
    undo: tuple[Step, ...]
    y: Tensor
    target: Tensor
    weight: Tensor
    bias: Tensor | None
    params: Params


class Needs(NamedTuple):
    """Which gradients are asked for; those of the latent's tensors are always given."""

    y: bool = True
    target: bool = True
    weight: bool = True
    bias: bool = True


class Query(NamedTuple):
    """What a backend is asked to serve."""

    layer: Layer
    device: str
    dtype: torch.dtype


@dataclass
class Grads:
    """Gradients of one reverse layer; None where not needed."""

    y: Tensor | None = None
    target: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    params: list[Tensor | None] = field(default_factory=list)


class State(NamedTuple):
    """a of a layer, and whatever the backend's own backward reads of its latent."""

    a: Tensor
    latent: Any


def keeps_output(layer: Layer) -> bool:
    """Whether a = φ(u) alone is enough for the backward, so that u need not be kept."""
    if not layer.latent:
        return True
    step = layer.latent[0]
    return len(layer.latent) == 1 and isinstance(step, Activation) and TABLE[step.name].from_output(*step.args)
