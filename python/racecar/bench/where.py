"""Which layer of a network keeps what for the backward pass, for every contestant alike.

Nobody is asked to label what it keeps. The network is run once more with every tensor written down under a name that a
forward and a reverse pass can have (what a layer gave, what its norm received, what came back ...), and each kept
tensor is recognised by its values. So the same table serves plain training, the plain reverse pass and ours, whoever
computes it; and what is not recognised is listed as such.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from racecar.measure import Kept, kept_storages

from . import plain
from .contestants import LAM, Contestant
from .networks import Network
from .residual import Part, parts_of

_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}

INPUT, OUTPUT, PRE_ACTIVATION, RESULT = "input", "activation", "pre-activation", "network's output"
NORM_INPUT, NORM_OUTPUT = "norm input", "norm output"
POOLED, PLACES, PADDED = "pooled copy", "pooling indices", "padded copy"
STATISTICS, BUFFERS = "norm statistics", "running statistics"
SOURCE, COMES_BACK, BACK = "reverse: y - b", "reverse: u", "reverse: a"
BACK_PADDED, BACK_PLACES = "reverse: padded copy", "reverse: pooling indices"
UNDONE, RESIDUAL = "reverse: undone copy", "reverse: residual"
EVERY_D, EVERY_A = "d of every layer", "a of every layer"  # of a chain of narrow linear layers, each in one tensor
LOSSES, RANDOM, OTHER = "losses, scalars", "random state", "not recognised"


@dataclass(frozen=True)
class Row:
    """Bytes of one kind of tensor at one layer; layer 0 is what belongs to none."""

    layer: int
    name: str
    role: str
    kept: int


class Named:
    """A tensor that a forward or reverse pass can have, and how to tell whether a kept one is the same."""

    def __init__(self, layer: int, role: str, tensor: Tensor) -> None:
        self.layer, self.role = layer, role
        self.values = tensor.detach()
        self.size = _size(self.values)

    def is_in(self, kept: Tensor, size: float) -> bool:
        """Whether `kept`, whose norm is `size`, holds these values, in any integer type."""
        if kept.shape != self.values.shape or kept.is_floating_point() != self.values.is_floating_point():
            return False
        if not math.isclose(size, self.size, rel_tol=1e-3):  # cheaper than a look at every element
            return False
        if not kept.is_floating_point():
            return torch.equal(kept.long(), self.values.long())
        scale = float(self.values.abs().max()) or 1.0
        return torch.allclose(kept.to(self.values.dtype), self.values, rtol=1e-3, atol=1e-5 * scale)


class Packed(Named):
    """Several tensors in one, in whatever order their values are there."""

    def __init__(self, role: str, tensors: Sequence[Tensor]) -> None:
        super().__init__(0, role, torch.cat([t.flatten() for t in tensors]).sort().values)

    def is_in(self, kept: Tensor, size: float) -> bool:
        """As `Named`, element by element in the order of size."""
        return kept.numel() == self.values.numel() and super().is_in(kept.flatten().sort().values, size)


def _size(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def kept_by_layer(
    network: Network, contestant: Contestant, *, batch: int | None = None, tiny: bool = False
) -> list[Row]:
    """What the contestant keeps between forward and backward pass, layer by layer; the sum is `kept_bytes`.

    Dropout is off, for its masks are drawn anew at every forward.

    Raises:
        racecar.bench.contestants.CannotRunError: the contestant cannot run here.
    """
    torch.manual_seed(0)
    net, x = network.model(narrow=tiny), network.inputs(batch or network.batch, tiny=tiny)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    own = copy.deepcopy(net)
    forward = contestant.prepare(own, x, LAM)
    forward().backward()  # what is allocated once and for all is no one's
    own.zero_grad(set_to_none=True)
    found = kept_storages(forward, own.parameters())
    named = named_tensors(net, x, contestant.variant or "local", reverse=contestant.variant is not None)
    sums: dict[tuple[int, str], int] = {}
    buffers = {b.untyped_storage().data_ptr() for b in own.buffers()}
    names = ["no layer", *layer_names(net)]
    for kept in found:
        match = _recognised(kept, named, buffers, len(names))
        sums[match] = sums.get(match, 0) + kept.size
    order = {key: i for i, key in enumerate(dict.fromkeys((n.layer, n.role) for n in named))}
    return [
        Row(layer, names[layer], role, size)
        for (layer, role), size in sorted(
            sums.items(), key=lambda entry: (entry[0][0] or 10**6, order.get(entry[0], 0))
        )
    ]


def layer_names(net: nn.Module) -> list[str]:
    """One per layer, m = 1 first: `1 Conv2d 1->64`."""
    ops = [layer.op for part in parts_of(net) for layer in plain.layers_of(part.chain(net))]
    return [f"{m} {_operation(op)}" for m, op in enumerate(ops, 1)]


def _operation(op: nn.Module) -> str:
    sizes = (op.in_features, op.out_features) if isinstance(op, nn.Linear) else (op.in_channels, op.out_channels)
    return f"{type(op).__name__} {sizes[0]}->{sizes[1]}"


def _recognised(kept: Kept, named: Sequence[Named], buffers: set[int], scalars: int) -> tuple[int, str]:
    if any(tensor.untyped_storage().data_ptr() in buffers for tensor in kept.tensors):
        return 0, BUFFERS
    views = {(t.shape, t.stride(), t.storage_offset()): t for t in kept.tensors}
    sized = [(tensor, _size(tensor)) for tensor in views.values()]
    for one in named:
        if any(one.is_in(tensor, size) for tensor, size in sized):
            return one.layer, one.role
    if kept.size <= 8 * scalars and all(tensor.dim() < 2 for tensor in kept.tensors):  # a number per layer at most
        return 0, LOSSES
    state = torch.get_rng_state()
    if any(tensor.dtype == state.dtype and tensor.shape == state.shape for tensor in kept.tensors):
        return 0, RANDOM  # of a checkpoint around dropout
    return 0, OTHER


@torch.no_grad()
def named_tensors(net: nn.Module, x: Tensor, variant: str, *, reverse: bool) -> list[Named]:
    """Every tensor that training by this variant computes, forwards first; layer m = 1 is the first."""
    net = copy.deepcopy(net)
    found: list[Named] = [Named(1, INPUT, x)]
    inputs: dict[str, Tensor] = {}

    def remember(path: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[path] = args[0].clone()

        return hook

    parts = parts_of(net)
    for part in parts:
        net.get_submodule(part.path).register_forward_pre_hook(remember(part.path))  # type: ignore[arg-type]
    output = net(x)
    start = 0
    backwards: list[Named] = []
    for part in parts:
        layers = plain.layers_of(part.chain(net))
        forward, back = _of_part(layers, inputs[part.path], part, variant, start)
        found += forward
        backwards += back
        start += len(layers)
    found.append(Named(0, RESULT, output))  # of a residual network: what the last addition gave
    return found + (backwards if reverse else [])


def _of_part(
    layers: list[plain.Layer], x: Tensor, part: Part, variant: str, start: int
) -> tuple[list[Named], list[Named]]:
    forward, groups = [Named(start + 1, INPUT, x)], []
    d, sizes = [x], []
    for m, layer in enumerate(layers, start + 1):
        h = d[-1]
        sizes.append([h.shape])
        for module in layer.pre:
            if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
                forward.append(Named(m, PLACES, _places(module, h)))
            h = module(h)
            sizes[-1].append(h.shape)
            forward.append(Named(m, POOLED, h))
        forward += _padded(m, PADDED, layer.op, h)
        h = layer.op(h)
        named, h = _latent(m, layer.latent, h)
        forward += named
        d.append(h)
    y, came_back = d[-1], list[Tensor]()
    for m in range(len(layers) - 1, -1, -1):
        source = y if variant == "full" else d[m + 1]
        back: list[Named] = []
        op: Any = layers[m].op
        if op.bias is not None:
            linear = isinstance(op, nn.Linear)
            shifted = source - (op.bias if linear else op.bias.view(-1, *[1] * (source.dim() - 2)))
            back += [Named(start + m + 1, SOURCE, shifted), *_padded(start + m + 1, BACK_PADDED, op, shifted)]
        u = plain.transposed(op, source, sizes[m][-1])
        below = layers[m - 1].latent if m else [] if part.input_activation is None else [part.input_activation]
        named, a = _latent(start + m + 1, below, u, back=True)
        back += named
        if len(layers[m].pre) == 1 and isinstance(layers[m].pre[0], nn.Upsample):  # undone by max pooling
            factor = [big // small for big, small in zip(a.shape[2:], sizes[m][0][2:], strict=True)]
            back.append(Named(start + m + 1, BACK_PLACES, _MAX_POOL[a.dim()](a, factor, return_indices=True)[1]))
        y = plain.undo(layers[m].pre, a, sizes[m])
        came_back.append(a)
        groups.append([*back, Named(start + m + 1, UNDONE, y), Named(start + m + 1, RESIDUAL, d[m] - y)])
    backwards = [named for group in reversed(groups) for named in group]
    if len(d) > 2 and all(isinstance(layer.op, nn.Linear) for layer in layers):
        forward.append(Packed(EVERY_D, d[1:-1]))
        backwards.append(Packed(EVERY_A, came_back))
    return forward, backwards


def _padded(m: int, role: str, op: Any, h: Tensor) -> list[Named]:
    """What a convolution on a periodic grid makes of its input first."""
    if getattr(op, "padding_mode", "zeros") != "circular":
        return []
    around = [p for p in reversed(op.padding) for _ in range(2)]
    return [Named(m, role, F.pad(h, around, mode="circular"))]


def _places(module: Any, h: Tensor) -> Tensor:
    indices = copy.copy(module)
    indices.return_indices = True
    places: Tensor = indices(h)[1]
    return places


def _latent(m: int, modules: Sequence[nn.Module], h: Tensor, *, back: bool = False) -> tuple[list[Named], Tensor]:
    """Norms and activations one by one: what goes in, what lies in between, what comes out at last."""
    prefix, found = "reverse: " if back else "", []
    for i, module in enumerate(modules):
        norm = module if isinstance(module, plain.BATCH_NORMS) else None
        role = NORM_INPUT if norm is not None else NORM_OUTPUT if i else PRE_ACTIVATION
        found.append(Named(m, COMES_BACK if back and i == 0 else prefix + role, h))
        if norm is not None:
            found += _statistics(m, norm, h)
            h = F.batch_norm(h, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        else:
            h = module(h)
    # a result comes first: without a latent it is the operation's own output as well
    return [Named(m, BACK if back else OUTPUT, h), *found], h


def _statistics(m: int, norm: Any, h: Tensor) -> list[Named]:
    """Mean and 1/deviation of every channel."""
    over = [i for i in range(h.dim()) if i != 1]
    mean, variance = h.mean(over), h.var(over, unbiased=False)
    return [Named(m, STATISTICS, mean), Named(m, STATISTICS, (variance + norm.eps).rsqrt())]
