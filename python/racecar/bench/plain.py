"""The reverse pass as an expert writes it in plain PyTorch: the baseline that ours is held against.

Nothing here is shared with `racecar_kernels`, so it also serves as the second opinion on its gradients. What an expert
does: `F.mse_loss` instead of a difference that autograd keeps twice, activations in place where that is allowed,
`F.interpolate` to undo a pooling, a transposed convolution with `output_padding` instead of a padded copy, a periodic
convolution's adjoint as a periodic convolution instead of borders that are summed back.

Serves chains of Linear and Conv1d/2d/3d with numeric zero padding (or circular padding that keeps the size), batch
norm, elementwise activations, non-overlapping pooling, nearest up-sampling and dropout: the networks of `networks` and
most of the contract's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .residual import parts_of

TIED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv_transpose1d,
    nn.Conv2d: F.conv_transpose2d,
    nn.Conv3d: F.conv_transpose3d,
}
MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
IN_PLACE: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.ReLU: lambda module, h: torch.relu_(h),
    nn.LeakyReLU: lambda module, h: F.leaky_relu_(h, module.negative_slope),
    nn.Tanh: lambda module, h: torch.tanh_(h),
    nn.Sigmoid: lambda module, h: torch.sigmoid_(h),
}

Losses = Callable[..., tuple[Tensor, list[Tensor]]]


@dataclass
class Layer:
    """pre -> op -> latent, as in docs/concepts.md."""

    op: nn.Module
    pre: list[nn.Module] = field(default_factory=list)
    latent: list[nn.Module] = field(default_factory=list)


def layers_of(net: nn.Sequential) -> list[Layer]:
    """The layers of a chain; what follows the last latent is not part of the reverse pass."""
    layers: list[Layer] = []
    pre: list[nn.Module] = []
    for module in _flattened(net):
        if isinstance(module, TIED):
            layers.append(Layer(module, pre))
            pre = []
        elif isinstance(module, (*POOLS, nn.Upsample, nn.Dropout)):
            pre.append(module)
        elif layers and not pre:
            layers[-1].latent.append(module)
        else:
            raise NotImplementedError(f"{type(module).__name__} does not follow a linear or convolutional operation")
    return layers


def forward_and_losses(
    net: nn.Sequential,
    x: Tensor,
    variant: str,
    *,
    layers: list[Layer] | None = None,
    input_activation: nn.Module | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The network's output and the l2 loss of every layer, m = 1 first; `variant` is `full` or `local`."""
    layers = layers_of(net) if layers is None else layers
    d: list[Tensor] = [x]
    sizes: list[list[torch.Size]] = []
    for layer in layers:
        out, seen = run_forward(layer, d[-1])
        d.append(out)
        sizes.append(seen)
    losses: list[Tensor] = []
    source = d[-1]
    for m in range(len(layers) - 1, -1, -1):
        y = source if variant == "full" else d[m + 1]
        h = run_back(layers, m, y, sizes[m], input_activation)
        source = undo(layers[m].pre, h, sizes[m])
        losses.append(l2(source, d[m]))
    return d[-1], losses[::-1]


def run_forward(layer: Layer, d: Tensor) -> tuple[Tensor, list[torch.Size]]:
    """What a layer gives; the shapes of what every `pre` receives and, last, of what the tied operation receives."""
    sizes = [d.shape]
    for module in layer.pre:
        d = module(d)
        sizes.append(d.shape)
    d = layer.op(d)
    for module in layer.latent:
        d = module(d)
    return d, sizes


def run_back(
    layers: list[Layer], m: int, y: Tensor, sizes: list[torch.Size], input_activation: nn.Module | None
) -> Tensor:
    """a of layer m, from y."""
    h = transposed(layers[m].op, y, sizes[-1])
    below = layers[m - 1].latent if m else [] if input_activation is None else [input_activation]
    return _latent_in_reverse(below, h)


def l2(source: Tensor, d: Tensor) -> Tensor:
    """Half the sum of the squared differences."""
    return F.mse_loss(source, d, reduction="sum") / 2


class ReversedPart(nn.Module):
    """A chain that leaves the losses of its reverse pass behind at every forward."""

    def __init__(
        self, chain: nn.Sequential, variant: str, input_activation: nn.Module | None, run: Losses = forward_and_losses
    ) -> None:
        super().__init__()
        self.chain, self.variant, self.run = chain, variant, run
        self.layers, self.input_activation = layers_of(chain), input_activation
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y, self.losses = self.run(
            self.chain, x, self.variant, layers=self.layers, input_activation=self.input_activation
        )
        return y

    def take(self) -> list[Tensor]:
        """The losses, which nobody else holds then."""
        losses, self.losses = self.losses, []
        return losses


def reversed_parts(model: nn.Module, variant: str, run: Losses = forward_and_losses) -> tuple[nn.Module, list[Any]]:
    """The model with every part of it that runs backwards replaced by a `ReversedPart`, and those parts."""
    found = []
    for part in parts_of(model):
        reverse = ReversedPart(part.chain(model), variant, part.input_activation, run)
        found.append(reverse)
        if not part.path:
            return reverse, found
        model.set_submodule(part.path, reverse)
    return model, found


def transposed(op: nn.Module, y: Tensor, size: torch.Size) -> Tensor:
    """W^T (y - b), of shape `size`: what the tied operation received."""
    if isinstance(op, nn.Linear):
        return (y if op.bias is None else y - op.bias) @ op.weight
    assert isinstance(op, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if isinstance(op.padding, str) or op.padding_mode not in ("zeros", "circular"):
        raise NotImplementedError(f"numeric zero padding is served, got {op.padding!r} with mode {op.padding_mode!r}")
    dims = len(op.kernel_size)
    if op.bias is not None:
        y = y - op.bias.view(-1, *[1] * dims)
    if op.padding_mode == "circular":
        return _transposed_circular(op, y, size)
    missing = [
        size[2 + i]
        - ((y.shape[2 + i] - 1) * op.stride[i] - 2 * op.padding[i] + op.dilation[i] * (op.kernel_size[i] - 1) + 1)
        for i in range(dims)
    ]
    return CONV_TRANSPOSE[type(op)](y, op.weight, None, op.stride, op.padding, missing, op.groups, op.dilation)


def _transposed_circular(op: Any, y: Tensor, size: torch.Size) -> Tensor:
    """The adjoint of a periodic convolution that keeps the size is a periodic one with the kernel turned round."""
    around = [(k - 1) // 2 for k in op.kernel_size]
    if y.shape[2:] != size[2:] or op.padding != tuple(around) or any(n != 1 for n in (*op.stride, *op.dilation)):
        raise NotImplementedError(f"circular padding is served where it keeps the size of stride 1, got {op}")
    y = F.pad(y, [p for p in reversed(around) for _ in range(2)], mode="circular")
    padding = [k - 1 for k in op.kernel_size]
    return CONV_TRANSPOSE[type(op)](y, op.weight, None, op.stride, padding, 0, op.groups, op.dilation)


def _flattened(net: nn.Sequential) -> Iterator[nn.Module]:
    for module in net:
        if isinstance(module, nn.Sequential):
            yield from _flattened(module)
        else:
            yield module


def _latent_in_reverse(modules: list[nn.Module], h: Tensor) -> Tensor:
    fresh = True  # `h` was just made here and its maker does not need it: it may be changed in place
    for module in modules:
        if isinstance(module, BATCH_NORMS):
            statistics = (None, None) if module.training else (module.running_mean, module.running_var)
            h = F.batch_norm(h, *statistics, module.weight, module.bias, module.training, 0.0, module.eps)
            fresh = True
        elif fresh and type(module) in IN_PLACE:
            h = IN_PLACE[type(module)](module, h)
            fresh = False
        else:
            h = module(h)
            fresh = False
    return h


def undo(pre: list[nn.Module], h: Tensor, sizes: list[torch.Size]) -> Tensor:
    """From what comes back to the shape in which the layer received it."""
    for module, size in zip(reversed(pre), reversed(sizes[:-1]), strict=True):
        if isinstance(module, POOLS):
            if module.stride != module.kernel_size or any(a % b for a, b in zip(size[2:], h.shape[2:], strict=True)):
                raise NotImplementedError(
                    f"pooling that tiles its input is served, got kernel {module.kernel_size}, stride {module.stride} "
                    f"and input {tuple(size)}"
                )
            h = F.interpolate(h, size[2:], mode="nearest")
        elif isinstance(module, nn.Upsample):
            if module.mode != "nearest":
                raise NotImplementedError(f"nearest up-sampling is served, got {module.mode!r}")
            h = MAX_POOL[h.dim()](h, [big // small for big, small in zip(h.shape[2:], size[2:], strict=True)])
    return h
