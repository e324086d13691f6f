"""The C++ backend of a reverse layer on the CPU: the kernels of csrc/ around PyTorch's own convolutions."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension, phi, reverse
from ..contract import Call, Grads, Needs, Params, Query, State, keeps_output
from ..layer import Layer
from ..lazy import Lazy
from ..pointwise import DTYPES, KERNELS


def why_not(query: Query) -> str | None:
    """None where the kernels serve this layer, else a sentence that says why not."""
    if query.device != "cpu":
        return f"the C++ kernels run on the CPU, got tensors on {query.device}"
    if query.dtype not in DTYPES:
        return f"the C++ kernels serve {', '.join(map(str, DTYPES))}, got {query.dtype}"
    return extension.why_not(warn=False)


def forward(call: Call) -> tuple[State, Tensor | None, Tensor]:
    """The layer's state, u where that must be kept instead of a (else None), and Σ (target - undo_pre(a))²."""
    r = _reverse(call)
    reading, kept = reverse.run(KERNELS, r)
    loss, _ = reverse.compare(KERNELS, r, reading.lazy, None, None)
    if keeps_output(call.layer):
        a = reverse.made(KERNELS.materialise(reading.lazy, in_place=True)[0])
        return State(a, resumed(call.layer, a, call.params)), None, loss
    return State(reverse.whole(KERNELS, reading.lazy), (reading, kept)), kept, loss


def resume(layer: Layer, kept: Tensor, params: Params) -> State:
    """The state again, from the one tensor that was kept."""
    own = resumed(layer, kept, params)
    return State(reverse.whole(KERNELS, own[0].lazy), own)


def resumed(layer: Layer, kept: Tensor, params: Params) -> tuple[phi.Reading, Tensor]:
    """φ as the kernels read it, and the tensor that it is read from."""
    return phi.read(KERNELS, kept, layer.latent, params, done=keeps_output(layer)), kept


def backward(call: Call, state: State, grad_a: Tensor | None, c: Tensor | None, needs: Needs) -> Grads:
    """Gradients from ∂/∂a and from c, twice the gradient of the sum of squares; either may be None."""
    layer, grads = call.layer, Grads(params=[None] * call.layer.tensors)
    r = _reverse(call)
    reading, kept = state.latent
    if c is not None and layer.compare and needs.target:
        grads.target = reverse.target_gradient(KERNELS, r, reading.lazy, c)
    if grad_a is None and (c is None or not layer.compare):
        return grads
    g = None if grad_a is None else grad_a.clone(memory_format=torch.preserve_format)
    found = reverse.backward(
        KERNELS, r, reading, kept, g, c, needs_y=needs.y, needs_weight=needs.weight, needs_bias=needs.bias
    )
    grads.y, grads.weight, grads.bias, grads.params = found.y, found.weight, found.bias, found.params
    return grads


def _reverse(call: Call) -> reverse.Reverse:
    return reverse.Reverse(call.layer, call.undo, Lazy(call.y), Lazy(call.target), call.weight, call.bias, call.params)
