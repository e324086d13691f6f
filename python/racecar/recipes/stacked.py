"""Many small perceptrons of one shape as one network: every weight has a leading dimension, one row per network.

A step of a network with a few hundred weights is all overhead, and so is that of thirty of them if they take one
operation each together. The networks share no weight: the sum of their losses has the gradient of each by itself.
`tests/test_recipe_stacked.py` holds losses and gradients against `racecar.wrap` and `racecar.baselines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def perceptron(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Linear layers with tanh between them, and the initial weights of a seed; the global random state is left alone.

    Weights as in the code of Shwartz-Ziv & Tishby 2017: normal with standard deviation 1/√(inputs), cut at two of
    them; biases 0.
    """
    generator = torch.Generator().manual_seed(seed)
    network = uninitialised(widths)
    for layer in linear_layers(network):
        deviation = layer.in_features**-0.5
        nn.init.trunc_normal_(layer.weight, 0.0, deviation, -2 * deviation, 2 * deviation, generator=generator)
        nn.init.zeros_(layer.bias)
    return network


def uninitialised(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh between them, and whatever was in memory as weights."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.utils.skip_init(nn.Linear, inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def linear_layers(network: nn.Sequential) -> list[nn.Linear]:
    """Those of a perceptron, m = 1 first."""
    return [module for module in network if isinstance(module, nn.Linear)]


@dataclass
class Stack:
    """N perceptrons with tanh between their layers.

    Attributes:
        weights: of layer m, (N, outputs, inputs). biases: (N, outputs, 1). m = 1 first.
    """

    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def of(cls, networks: Sequence[nn.Sequential]) -> Stack:
        """A copy of the networks' weights, as leaves that require gradients."""
        layers = list(zip(*map(linear_layers, networks), strict=True))
        return cls(
            [torch.stack([m.weight.detach() for m in layer]).requires_grad_() for layer in layers],
            [torch.stack([m.bias.detach() for m in layer])[..., None].requires_grad_() for layer in layers],
        )

    def __len__(self) -> int:
        return len(self.weights[0])

    @property
    def widths(self) -> list[int]:
        """Inputs of the first layer, then outputs of every layer."""
        return [self.weights[0].shape[2], *(w.shape[1] for w in self.weights)]

    @property
    def parameters(self) -> list[Tensor]:
        """Weight and bias of every layer."""
        return [p for pair in zip(self.weights, self.biases, strict=True) for p in pair]

    def rows(self, index: Tensor | slice) -> Stack:
        """Some of the networks; of a slice a view, through which gradients flow."""
        return Stack([w[index] for w in self.weights], [b[index] for b in self.biases])

    def leaves(self) -> Stack:
        """A copy that requires gradients and has no history."""
        return Stack(*([p.detach().clone().requires_grad_() for p in own] for own in (self.weights, self.biases)))

    def network(self, row: int) -> nn.Sequential:
        """One of them as a plain module."""
        own = uninitialised(self.widths)
        with torch.no_grad():
            for layer, weight, bias in zip(linear_layers(own), self.weights, self.biases, strict=True):
                layer.weight.copy_(weight[row])
                layer.bias.copy_(bias[row, :, 0])
        return own


def _tanh_(x: Tensor) -> Tensor:
    """tanh(x) = 2 σ(2x) − 1 in place, which takes a third of the time of `torch.tanh` on a CPU.

    Where tanh(x) is small its error is that of the 1, 6e-8, and not relative to it.
    """
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


class _Tanh(torch.autograd.Function):
    """The same with a gradient, out of place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = _tanh_(x.clone())
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(grad, *ctx.saved_tensors)


class _Forward(torch.autograd.Function):
    """d_2 .. d_{n+1}, with the gradient written down: a node less for every operation, and sums in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        d = [x]
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            d.append(torch.baddbmm(bias, weight, d[-1]))
            if len(d) <= len(parameters) // 2:
                _tanh_(d[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters[::2], *d)
        return tuple(d[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layers = len(grads)
        weights, d = ctx.saved_tensors[:layers], ctx.saved_tensors[layers:]
        found: list[Tensor | None] = []
        grad: Tensor | None = None  # of d_{m+1}, from above
        for m in range(layers - 1, -1, -1):
            own = grads[m]
            if grad is None:
                grad = None if own is None else own.clone()
            elif own is not None:
                grad += own
            if grad is None:
                found += [None, None]
                continue
            if m < layers - 1:
                torch.ops.aten.tanh_backward.grad_input(grad, d[m + 1], grad_input=grad)
            found += [grad.sum(2, keepdim=True), torch.bmm(grad, d[m].mT)]
            grad = torch.bmm(weights[m].mT, grad) if m else None
        return (None, *found[::-1])


def states(stack: Stack, x: Tensor) -> list[Tensor]:
    """d_1 .. d_{n+1}: what every layer receives, and the output, which has no tanh. x, and each: (N, width, batch).

    Gradients reach the stack, not x.
    """
    return [x, *_Forward.apply(x, *stack.parameters)]


def reconstructed(stack: Stack, d: Sequence[Tensor], *, full: bool, input_tanh: bool) -> list[Tensor]:
    """d'_1 .. d'_n of the reverse pass: full, or local.

    Args:
        stack: the networks.
        d: their states.
        full: from the output down; False: every layer from its own output.
        input_tanh: whether tanh is applied to what comes back at the input.
    """
    back: list[Tensor] = []
    y = d[-1]
    for m in range(len(stack.weights) - 1, -1, -1):
        source = y if full else d[m + 1]
        u = torch.bmm(stack.weights[m].mT, source - stack.biases[m])
        y = _Tanh.apply(u) if m or input_tanh else u
        back.append(y)
    return back[::-1]


def reverse_losses(d: Sequence[Tensor], back: Sequence[Tensor]) -> Tensor:
    """½ Σ (d_m − d'_m)² over batch and elements: (N, n)."""
    pairs = zip(d, back, strict=False)
    return torch.stack([0.5 * (own - other).square().sum((1, 2)) for own, other in pairs], 1)


class _HalfSquares(torch.autograd.Function):
    """½ Σ_m λ_m |d_m − d'_m|², with the gradient written down: one pass over each residual instead of four."""

    @staticmethod
    def forward(ctx: Any, lam: Tensor, *states_and_back: Tensor) -> Tensor:
        half = len(states_and_back) // 2
        residuals = [own - other for own, other in zip(states_and_back[:half], states_and_back[half:], strict=True)]
        ctx.save_for_backward(lam, *residuals)
        squares = torch.stack([torch.linalg.vector_norm(r, dim=(1, 2)) for r in residuals], 1).square()
        return (0.5 * lam * squares).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lam, *residuals = ctx.saved_tensors
        scale = (lam * grad[:, None])[..., None, None]
        grads = [r * scale[:, m] for m, r in enumerate(residuals)]
        return (None, *grads, *(-g for g in grads))


def weighted_reverse(d: Sequence[Tensor], back: Sequence[Tensor], lam: Tensor) -> Tensor:
    """Σ_m λ_m · ½ Σ (d_m − d'_m)², of every network: (N,).

    Args:
        d, back: of `states` and `reconstructed`.
        lam: λ of every network and layer, (N, n).
    """
    loss: Tensor = _HalfSquares.apply(lam, *d[: len(back)], *back)
    return loss


def cross_entropy(logits: Tensor, labels: Tensor, *, twice: bool = False) -> Tensor:
    """Mean cross-entropy of every network between two classes: (N,).

    Args:
        logits: (N, 2, batch).
        labels: −1 for the first class, 1 for the second, (N, batch).
        twice: softmax once more than there should be, as in the authors' published code; see docs/recipes.md.
    """
    margin = (logits[:, 1] - logits[:, 0]) * labels
    if twice:  # the difference of the two probabilities takes the place of that of the logits
        margin = _Tanh.apply(0.5 * margin)
    return F.softplus(-margin).mean(1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the batch that every network names rightly: (N,). Labels as in `cross_entropy`."""
    return ((logits[:, 1] > logits[:, 0]) == (labels > 0)).double().mean(1)


def srip(stack: Stack, v: Tensor, *, iterations: int = 2) -> Tensor:
    """Σ σ(WWᵀ − I) over the layers, estimated as in `racecar.baselines.srip(side="outputs")`: (N,).

    Every W is padded with zeros to the largest one's size, so that all layers take one operation together; v is 0 where
    a layer has no output, and stays 0 there.

    Args:
        stack: the networks.
        v: what the power iteration starts from, (N, n, largest number of outputs, 1); see `start_vectors`.
        iterations: as there.
    """
    count, layers, rows, _ = v.shape
    columns = max(w.shape[2] for w in stack.weights)
    padded = [F.pad(w, (0, columns - w.shape[2], 0, rows - w.shape[1])) for w in stack.weights]
    w = torch.stack(padded, 1).view(count * layers, rows, columns)
    v = v.reshape(count * layers, rows, 1)

    def deviation(of: Tensor) -> Tensor:
        return torch.bmm(w, torch.bmm(w.mT, of)) - of

    for _ in range(iterations):
        u = deviation(v)
        norm = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        v = deviation(u / torch.where(norm > 0, norm, 1.0))
    return torch.linalg.vector_norm(v, dim=(1, 2)).view(count, layers).sum(1)


def start_vectors(stack: Stack, generator: torch.Generator) -> Tensor:
    """Random v for `srip`: (N, n, largest number of outputs, 1)."""
    outputs = stack.widths[1:]
    v = torch.randn(len(stack), len(outputs), max(outputs), 1, generator=generator)
    place = torch.arange(max(outputs))
    return v * (place < torch.tensor(outputs)[:, None])[None, :, :, None]


@dataclass
class Decoders:
    """A linear decoder of its own for every network, of greedy layer-wise pretraining: d' = V h + c.

    Attributes:
        weight: V, (N, inputs, outputs) of the layer. bias: c, (N, inputs, 1).
    """

    weight: Tensor
    bias: Tensor


def autoencoder_loss(stack: Stack, m: int, decoders: Decoders, x: Tensor) -> Tensor:
    """mean((V h + c − d_m)²) of layer m, from 0, with h = d_{m+1}, as `racecar.baselines.LayerAutoencoder`: (N,).

    Gradients reach the layer and its decoder, and stop at d_m.
    """
    with torch.no_grad():
        d = states(stack, x)[m]
    h = torch.baddbmm(stack.biases[m], stack.weights[m], d)
    h = h if m == len(stack.weights) - 1 else _Tanh.apply(h)
    back = torch.baddbmm(decoders.bias, decoders.weight, h)
    return (back - d).square().mean((1, 2))
