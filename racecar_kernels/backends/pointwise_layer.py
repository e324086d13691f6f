"""One reverse layer on a pointwise family around PyTorch's own convolutions: what the backends that have one share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import phi, reverse
from ..contract import Call, Grads, Needs, Params, State, keeps_output
from ..layer import Layer
from ..lazy import Lazy
from ..pointwise import Family


@dataclass(frozen=True)
class PointwiseLayer:
    """The three functions of a backend (`contract.py`). `kernels()` gives the family; asked for at the first call."""

    kernels: Callable[[], Family]

    def forward(self, call: Call) -> tuple[State, Tensor | None, Tensor]:
        """The layer's state, u where that must be kept instead of a (else None), and Σ (target - undo_pre(a))²."""
        r, kernels = _reverse(call), self.kernels()
        reading, kept, loss, _ = reverse.run(kernels, r)
        if loss is None:
            loss, _ = reverse.compare(kernels, r, reading.lazy, None, None)
        if keeps_output(call.layer):
            a = reverse.made(kernels.materialise(reading.lazy, in_place=True)[0])
            return State(a, self.resumed(call.layer, a, call.params)), None, loss
        return State(reverse.whole(kernels, reading.lazy), (reading, kept)), kept, loss

    def resume(self, layer: Layer, kept: Tensor, params: Params) -> State:
        """The state again, from the one tensor that was kept."""
        own = self.resumed(layer, kept, params)
        return State(reverse.whole(self.kernels(), own[0].lazy), own)

    def resumed(self, layer: Layer, kept: Tensor, params: Params) -> tuple[phi.Reading, Tensor]:
        """φ as the kernels read it, and the tensor that it is read from."""
        return phi.read(self.kernels(), kept, layer.latent, params, done=keeps_output(layer)), kept

    def backward(self, call: Call, state: State, grad_a: Tensor | None, c: Tensor | None, needs: Needs) -> Grads:
        """Gradients from ∂/∂a and from c, twice the gradient of the sum of squares; either may be None."""
        layer, grads, kernels = call.layer, Grads(params=[None] * call.layer.tensors), self.kernels()
        r = _reverse(call)
        reading, kept = state.latent
        if c is not None and layer.compare and needs.target:
            grads.target = reverse.target_gradient(kernels, r, reading.lazy, c)
        if grad_a is None and (c is None or not layer.compare):
            return grads
        g = None if grad_a is None else grad_a.clone(memory_format=torch.preserve_format)
        found = reverse.backward(
            kernels, r, reading, kept, g, c, needs_y=needs.y, needs_weight=needs.weight, needs_bias=needs.bias
        )
        grads.y, grads.weight, grads.bias, grads.params = found.y, found.weight, found.bias, found.params
        return grads


def _reverse(call: Call) -> reverse.Reverse:
    return reverse.Reverse(call.layer, call.undo, Lazy(call.y), Lazy(call.target), call.weight, call.bias, call.params)
