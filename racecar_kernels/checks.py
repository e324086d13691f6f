"""What is refused, each with a sentence that says what was given and what would be right.

Reads shapes, dtypes and devices only, so it runs on fake tensors too, and before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layer import Activation, Chain, Layer, Norm, Pool, Segment, Step, after_steps

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Words(NamedTuple):
    """What a sentence calls a layer, and the tensors that it does not share with the layers around it."""

    at: str = ""  # in front of everything
    y: str = "y"
    target: str = "target"
    has: str = "target has"
    back: str = "what comes back"
    latents: str = "the latent"


def check(
    segment: Segment,
    y: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
) -> None:
    """Raises TypeError for a wrong dtype, ValueError for anything else that does not fit together."""
    n = len(segment.layers)
    if not len(targets) == len(weights) == len(biases) == n:
        raise ValueError(
            f"{n} reverse layers need {n} targets, weights and biases each, "
            f"got {len(targets)}, {len(weights)} and {len(biases)}"
        )
    slots = sum(layer.tensors for layer in segment.layers)
    if len(params) != slots:
        raise ValueError(f"the latents of these layers take {slots} tensors (some may be None), got {len(params)}")
    check_tensors(
        y=y, **_numbered("target", targets, every=True), **_numbered("weight", weights, every=True),
        **_numbered("bias", biases), **_numbered("tensor of the latents", params),
    )  # fmt: skip
    words = Words()
    _check_tensor("y", y, y, words)
    source, at = tuple(y.shape), 0
    for i, layer in enumerate(segment.layers):
        _check_layer(layer, y, targets[i], weights[i], biases[i], words)
        _check_source(layer, segment.undo_of(i), source, targets[i], weights[i], first=i == 0)
        seen = layer.input_shape(tuple(targets[i].shape))
        _check_latent(layer, seen, y, params[at : at + layer.tensors], words)
        at += layer.tensors
        source = seen


def check_chain(
    chain: Chain,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
) -> None:
    """Raises as `check`, for the layers of a chain in the order of the forward."""
    n = len(chain.layers)
    if not n:
        raise ValueError("a chain needs at least one layer")
    if not len(weights) == len(biases) == n:
        raise ValueError(f"{n} layers need {n} weights and biases each, got {len(weights)} and {len(biases)}")
    if len(params) != chain.tensors:
        raise ValueError(
            f"the norms and activations of this chain take {chain.tensors} tensors (some may be None), "
            f"got {len(params)}"
        )
    if chain.layers[0].tensors:
        raise ValueError("the first layer's latent acts on the reconstructed input alone and takes no tensors")
    if not any(layer.compare for layer in chain.layers):
        raise ValueError("a chain needs at least one layer that is compared; without one it has no loss")
    for m, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
        check_tensors(**{f"layer {m}: weight": weight}, **({} if bias is None else {f"layer {m}: bias": bias}))
    check_tensors(x=x, **_numbered("tensor of the norms and activations", params))
    _check_tensor("x", x, x, Words(y="x"))
    if not x.dim():
        raise ValueError("x must be (N, C, *spatial) or (..., features), got a scalar")
    shape, at = tuple(x.shape), 0
    for m, layer in enumerate(chain.layers):
        receives = ("what it receives", "but receives") if m else ("x", "but x has")
        words = Words(f"layer {m + 1}: ", "x", *receives, "what comes back", "its norms and activations")
        for step in layer.pre:
            if isinstance(step, Pool) and step.mode == "other":
                raise ValueError("average pooling that counts in its own way has no place in a chain")
        full = _check_forward(layer, x, shape, weights[m], biases[m], words)
        if chain.reverses(m):  # φ of the layer below acts on what comes back, which pooling has made smaller
            below = params[at - layer.tensors : at]
            _check_latent(layer, layer.input_shape(shape), x, below, words)
        own = chain.latent(m)
        slots = sum(step.tensors for step in own)
        of_own = words._replace(back="what it gives")
        _check_latent(Layer(layer.tied, latent=own), full, x, params[at : at + slots], of_own)
        shape, at = full, at + slots


def _check_forward(
    layer: Layer, x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor | None, words: Words
) -> tuple[int, ...]:
    """The shape of what a layer of a chain gives; raises ValueError where it gives nothing."""
    if layer.tied.dims and len(shape) == layer.tied.dims + 2:
        seen = layer.input_shape(shape)
        if min(seen) < 1:
            raise ValueError(f"{words.at}{words.target}, {shape}, is too small for the pooling in front of it")
    _check_layer(layer, x, _shaped(x, shape), weight, bias, words)
    full = layer.output_shape(shape, tuple(weight.shape))
    if min(full) < 1:
        raise ValueError(f"{words.at}{words.target}, {shape}, is too small for weight {tuple(weight.shape)}")
    return full


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape that takes no memory."""
    return torch.empty(1, dtype=x.dtype, device=x.device).expand(shape)


def _numbered(name: str, tensors: Sequence[object], *, every: bool = False) -> dict[str, object]:
    """The tensors that are there, or `every` one, each with a name to be called by."""
    given = [(i + 1, t) for i, t in enumerate(tensors) if every or t is not None]
    return {f"{name} {i}" if len(tensors) > 1 else name: t for i, t in given}


def check_sequences(**sequences: object) -> None:
    """Raises TypeError for what holds no tensors: None, or a single tensor, which would be taken for its rows."""
    for name, value in sequences.items():
        if isinstance(value, Tensor) or not isinstance(value, Iterable):
            what = "a single tensor" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a sequence of tensors, got {what}")


def check_tensors(**tensors: object) -> None:
    """Raises TypeError for what is no dense tensor; before anything asks it for its device or dtype."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got one with layout {t.layout}; use its to_dense()")


def _check_tensor(name: str, t: Tensor, like: Tensor, words: Words) -> None:
    name = words.at + name
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be a real floating-point tensor (float64 to bfloat16), got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, {words.y} is on {like.device}; all tensors must be on one device")
    if t.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(t.shape)}; a reverse layer needs a batch of at least one")


def _check_layer(layer: Layer, y: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, words: Words) -> None:
    dims, at, shape = layer.tied.dims, words.at, tuple(target.shape)
    _check_tensor(words.target, target, y, words)
    _check_tensor("weight", weight, y, words)
    if weight.dtype != y.dtype:
        raise TypeError(f"{at}weight is {weight.dtype}, {words.y} is {y.dtype}; both must have one dtype")
    if weight.dim() != dims + 2:
        kind = f"a {dims}d convolution's weight has {dims + 2}" if dims else "a linear weight has 2"
        raise ValueError(f"{at}{kind} dimensions, got {tuple(weight.shape)}")
    if dims and target.dim() != dims + 2:
        raise ValueError(
            f"{at}{words.target} of a {dims}d convolution must be (batch, channels, {dims} spatial sizes), got {shape}"
        )
    if not dims and target.dim() < 1:
        raise ValueError(f"{at}{words.target} of a linear layer must be (..., in_features), got a scalar")
    seen = layer.input_shape(shape)
    channels, expected = seen[1] if dims else seen[-1], weight.shape[1] * layer.tied.groups
    if channels != expected:
        what = "input channels" if dims else "input features"
        raise ValueError(f"{at}weight expects {expected} {what}, {words.has} {channels}")
    if dims and weight.shape[0] % layer.tied.groups:
        raise ValueError(
            f"{at}groups={layer.tied.groups} do not divide the {weight.shape[0]} output channels of weight"
        )
    _check_padding(layer, seen, at)
    if bias is not None:
        _check_tensor("bias", bias, y, words)
        if bias.dtype != y.dtype:
            raise TypeError(f"{at}bias is {bias.dtype}, {words.y} is {y.dtype}; both must have one dtype")
        if bias.shape != weight.shape[:1]:
            right = f"({weight.shape[0]},) to match weight"
            raise ValueError(f"{at}bias must have shape {right}, got {tuple(bias.shape)}")


def _check_padding(layer: Layer, seen: tuple[int, ...], at: str) -> None:
    """The padding modes read inside the image, so they cannot pad by more than it has."""
    mode = layer.tied.padding_mode
    most = {"reflect": -1, "circular": 0}
    for size, widths in zip(seen[2:], layer.tied.padding, strict=True) if mode in most else ():
        if max(widths) > size + most[mode]:
            raise ValueError(
                f"{at}padding_mode={mode!r} can pad an image of size {size} by at most {size + most[mode]}, "
                f"got {widths}"
            )


def _check_source(
    layer: Layer, undo: tuple[Step, ...], source: tuple[int, ...], target: Tensor, weight: Tensor, *, first: bool
) -> None:
    full = layer.output_shape(tuple(target.shape), tuple(weight.shape))
    if min(full) < 1:
        raise ValueError(
            f"target {tuple(target.shape)} is too small for weight {tuple(weight.shape)}: result {tuple(full)}"
        )
    expected = after_steps(full, undo)
    if source != expected:
        name = "y" if first else "the target of the layer above"
        raise ValueError(
            f"{name} gives a source of shape {source}; target {tuple(target.shape)} and weight {tuple(weight.shape)} "
            f"ask for {tuple(expected)}"
        )


def _check_latent(
    layer: Layer, shape: tuple[int, ...], y: Tensor, params: Sequence[Tensor | None], words: Words
) -> None:
    at = 0
    for step in layer.latent:
        own = params[at : at + step.tensors]
        at += step.tensors
        for t in own:
            if t is not None and t.device != y.device:
                raise ValueError(
                    f"{words.at}a tensor of {words.latents} is on {t.device}, {words.y} is on {y.device}; "
                    "use one device"
                )
        if len(shape) < 2 and isinstance(step, Norm) and step.kind != "layer":
            raise ValueError(f"{words.at}{step.kind} norm needs an input (N, C, ...), {words.back} has shape {shape}")
        channels = shape[1] if len(shape) > 1 else 1  # as PReLU counts them
        if isinstance(step, Activation):
            if own and (own[0] is None or own[0].numel() not in (1, channels)):
                given = None if own[0] is None else own[0].numel()
                raise ValueError(f"{words.at}PReLU needs 1 slope or one for each of {channels} channels, got {given}")
        elif step.kind == "layer":
            if tuple(shape[-len(step.shape) :]) != step.shape:
                raise ValueError(
                    f"{words.at}layer norm over {step.shape} cannot be applied to {words.back}, shape {shape}"
                )
        else:
            _check_norm(step, own, channels, words.at)


def _check_norm(step: Norm, own: Sequence[Tensor | None], channels: int, at: str) -> None:
    for name, t in zip(("scale", "shift", "mean", "variance"), own, strict=True):
        if t is not None and t.numel() != channels:
            raise ValueError(f"{at}the {step.kind} norm's {name} has {t.numel()} values, its input {channels} channels")
    if step.running and (own[2] is None or own[3] is None):
        raise ValueError(f"{at}a norm with running statistics needs their mean and variance, got None")
    if step.kind == "group" and channels % step.groups:
        raise ValueError(f"{at}group norm: {channels} channels do not divide into {step.groups} groups")
