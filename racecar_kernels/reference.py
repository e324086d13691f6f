"""One reverse layer in plain PyTorch: every device, float64 to bfloat16. The fallback, and the oracle of the kernels.

    s = undo(y) - b,   u = Wᵀ s,   a = φ(u),   loss = Σ (target - undo_pre(a))²

One tensor is kept per layer: a where the latent is differentiable from its output, else u. The source s, the undone
tensors and the residual are recomputed where a gradient needs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import latent, transposed, undo, weight_gradient
from .contract import Call, Grads, Needs, Params, State, keeps_output
from .layer import Ints, Layer


def forward(call: Call) -> tuple[State, Tensor | None, Tensor]:
    """The layer's state, u where that must be kept instead of a (else None), and Σ (target - undo_pre(a))²."""
    layer = call.layer
    y, factor = _source(call)
    s = y if call.bias is None else y - _per_channel(call.bias, y, layer)
    shape = layer.input_shape(tuple(call.target.shape))
    u = transposed.forward(s, call.weight, layer.tied, shape, factor)
    del s, y
    a, entries = latent.forward(u, layer.latent, call.params)
    kept = None if keeps_output(layer) else u
    loss = undo.sum_of_squares(call.target, a, layer.pre) if layer.compare else a.new_zeros((), dtype=torch.float32)
    return State(a, entries), kept, loss


def resume(layer: Layer, kept: Tensor, params: Params) -> State:
    """The state again, from the one tensor that was kept."""
    if keeps_output(layer):
        return State(kept, latent.from_output(kept, layer.latent))
    return State(*latent.forward(kept, layer.latent, params))


def backward(call: Call, state: State, grad_a: Tensor | None, c: Tensor | None, needs: Needs) -> Grads:
    """Gradients from ∂/∂a and from c, twice the gradient of the sum of squares; either may be None."""
    layer, grads = call.layer, Grads(params=[None] * call.layer.tensors)
    if c is not None and layer.compare:
        grads.target, from_loss = undo.residual_backward(
            c, call.target, state.a, layer.pre, target_needs_grad=needs.target
        )
        grad_a = from_loss if grad_a is None else from_loss.add_(grad_a)
        del from_loss
    if grad_a is None:
        return grads
    g, grads.params = latent.backward(grad_a, layer.latent, call.params, state.latent)
    del grad_a
    y, factor = _source(call)
    s = y if call.bias is None or not needs.weight else y - _per_channel(call.bias, y, layer)
    del y
    needs_bias = needs.bias and call.bias is not None
    grad_s, grads.weight = weight_gradient.backward(
        g, s, call.weight, layer.tied, factor, needs_source=needs.y or needs_bias, needs_weight=needs.weight
    )
    del g, s
    if grad_s is not None and needs_bias:
        grads.bias = over_channels(grad_s, layer).neg_()
    if grad_s is not None and needs.y:
        grads.y = grad_s
        if factor is None and call.undo:
            grads.y = undo.adjoint(grad_s, call.y, call.undo, _undone_shape(call))
    return grads


def _source(call: Call) -> tuple[Tensor, Ints | None]:
    """y undone; or y itself and the factors to fold, where it is a pooling that is undone and folding pays."""
    if not call.undo:
        return call.y, None
    shape, tied = _undone_shape(call), call.layer.tied
    small, weight = tuple(call.y.shape), tuple(call.weight.shape)
    factor = undo.whole_factors(call.undo, small, shape)
    foldable = factor is not None and transposed.can_fold(tied) and len(factor) == tied.dims
    if factor is not None and foldable and transposed.folding_pays(small, weight, factor):
        return call.y, factor
    return undo.apply(call.y, call.undo, shape), None


def _undone_shape(call: Call) -> Ints:
    return call.layer.output_shape(tuple(call.target.shape), tuple(call.weight.shape))


def _per_channel(bias: Tensor, y: Tensor, layer: Layer) -> Tensor:
    return bias if layer.tied.dims == 0 else bias.view(-1, *[1] * layer.tied.dims)


def over_channels(g: Tensor, layer: Layer) -> Tensor:
    """Sums over everything but the channels: what a bias receives."""
    channel = g.dim() - 1 if layer.tied.dims == 0 else 1
    rest = [d for d in range(g.dim()) if d != channel]
    return torch.sum(g, rest) if rest else g.clone()
