"""What is refused, each with a sentence that says what was given and what would be right.

Reads shapes, dtypes and devices only, so it runs on fake tensors too, and before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .activations import TABLE
from .layer import Activation, Chain, Layer, Norm, Pool, Segment, Step, after_steps

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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
        y=y, **_numbered("target", targets), **_numbered("weight", weights), **_numbered("bias", biases),
        **_numbered("tensor of the latents", params),
    )  # fmt: skip
    _check_tensor("y", y, y)
    source, at = tuple(y.shape), 0
    for i, layer in enumerate(segment.layers):
        _check_layer(layer, y, targets[i], weights[i], biases[i])
        _check_source(layer, segment.undo_of(i), source, targets[i], weights[i], first=i == 0)
        seen = layer.input_shape(tuple(targets[i].shape))
        _check_latent(layer, seen, y, params[at : at + layer.tensors])
        at += layer.tensors
        source = seen


def check_layers(layers: object, last: object) -> None:
    """Raises TypeError or ValueError for what describes no chain: modules, for example, or an activation of no name."""
    for name, values, kinds in (("layers", layers, (Layer,)), ("last", last, (Activation, Norm))):
        if not isinstance(values, Sequence):
            raise TypeError(f"{name} must be a sequence, got {type(values).__name__}")
        for value in values:
            if not isinstance(value, kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(
                    f"{name} holds {wanted} of racecar_kernels, got {type(value).__name__}; racecar.wrap takes modules"
                )
    latents = [step for layer in layers if isinstance(layer, Layer) for step in layer.latent]  # type: ignore[attr-defined]
    for step in (*latents, *last):  # type: ignore[misc]
        if isinstance(step, Activation) and step.name not in TABLE:
            raise ValueError(f"no activation is named {step.name!r}; there are {', '.join(TABLE)}")


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
    check_tensors(
        x=x, **_numbered("weight", weights), **_numbered("bias", biases),
        **_numbered("tensor of the norms and activations", params),
    )  # fmt: skip
    _check_tensor("x", x, x)
    if not x.dim():
        raise ValueError("x must be (N, C, *spatial) or (..., features), got a scalar")
    shape, at = tuple(x.shape), 0
    for m, layer in enumerate(chain.layers):
        for step in layer.pre:
            if isinstance(step, Pool) and step.mode == "other":
                raise ValueError("average pooling that counts in its own way has no place in a chain")
        _check_layer(layer, x, _shaped(x, shape), weights[m], biases[m])
        full = layer.output_shape(shape, tuple(weights[m].shape))
        if min(full) < 1:
            raise ValueError(f"layer {m + 1} received {shape}, too small for weight {tuple(weights[m].shape)}")
        if chain.reverses(m):  # φ of the layer below acts on what comes back, which pooling has made smaller
            below = params[at - layer.tensors : at]
            _check_latent(layer, layer.input_shape(shape), x, below)
        own = chain.latent(m)
        slots = sum(step.tensors for step in own)
        _check_latent(Layer(layer.tied, latent=own), full, x, params[at : at + slots])
        shape, at = full, at + slots


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape that takes no memory."""
    return torch.empty(1, dtype=x.dtype, device=x.device).expand(shape)


def _numbered(name: str, tensors: Sequence[object]) -> dict[str, object]:
    """The tensors that are there, each with a name to be called by."""
    return {f"{name} {i + 1}" if len(tensors) > 1 else name: t for i, t in enumerate(tensors) if t is not None}


def check_tensors(**tensors: object) -> None:
    """Raises TypeError for what is no dense tensor; before anything asks it for its device or dtype."""
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got one with layout {t.layout}; use {name}.to_dense()")


def _check_tensor(name: str, t: Tensor, like: Tensor) -> None:
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be a real floating-point tensor (float64 to bfloat16), got {t.dtype}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, y is on {like.device}; all tensors must be on one device")
    if t.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(t.shape)}; a reverse layer needs a batch of at least one")


def _check_layer(layer: Layer, y: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dims = layer.tied.dims
    _check_tensor("target", target, y)
    _check_tensor("weight", weight, y)
    if weight.dtype != y.dtype:
        raise TypeError(f"weight is {weight.dtype}, y is {y.dtype}; both must have one dtype")
    if weight.dim() != dims + 2:
        kind = f"a {dims}d convolution's weight has {dims + 2}" if dims else "a linear weight has 2"
        raise ValueError(f"{kind} dimensions, got {tuple(weight.shape)}")
    if dims and target.dim() != dims + 2:
        raise ValueError(
            f"target of a {dims}d convolution must be (batch, channels, {dims} spatial sizes), "
            f"got {tuple(target.shape)}"
        )
    if not dims and target.dim() < 1:
        raise ValueError("target of a linear layer must be (..., in_features), got a scalar")
    seen = layer.input_shape(tuple(target.shape))
    channels, expected = seen[1] if dims else seen[-1], weight.shape[1] * layer.tied.groups
    if channels != expected:
        what = "input channels" if dims else "input features"
        raise ValueError(f"weight expects {expected} {what}, target has {channels}")
    if dims and weight.shape[0] % layer.tied.groups:
        raise ValueError(f"groups={layer.tied.groups} do not divide the {weight.shape[0]} output channels of weight")
    _check_padding(layer, seen)
    if bias is not None:
        _check_tensor("bias", bias, y)
        if bias.dtype != y.dtype:
            raise TypeError(f"bias is {bias.dtype}, y is {y.dtype}; both must have one dtype")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}")


def _check_padding(layer: Layer, seen: tuple[int, ...]) -> None:
    """The padding modes read inside the image, so they cannot pad by more than it has."""
    mode = layer.tied.padding_mode
    most = {"reflect": -1, "circular": 0}
    for size, widths in zip(seen[2:], layer.tied.padding, strict=True) if mode in most else ():
        if max(widths) > size + most[mode]:
            raise ValueError(
                f"padding_mode={mode!r} can pad an image of size {size} by at most {size + most[mode]}, got {widths}"
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


def _check_latent(layer: Layer, shape: tuple[int, ...], y: Tensor, params: Sequence[Tensor | None]) -> None:
    at = 0
    for step in layer.latent:
        own = params[at : at + step.tensors]
        at += step.tensors
        for t in own:
            if t is not None and t.device != y.device:
                raise ValueError(f"a tensor of the latent is on {t.device}, y is on {y.device}; use one device")
        if len(shape) < 2 and isinstance(step, Norm) and step.kind != "layer":
            raise ValueError(f"{step.kind} norm needs an input (N, C, ...), what comes back has shape {shape}")
        channels = shape[1] if len(shape) > 1 else 1  # as PReLU counts them
        if isinstance(step, Activation):
            if own and (own[0] is None or own[0].numel() not in (1, channels)):
                given = None if own[0] is None else own[0].numel()
                raise ValueError(f"PReLU needs 1 slope or one for each of {channels} channels, got {given}")
        elif step.kind == "layer":
            if tuple(shape[-len(step.shape) :]) != step.shape:
                raise ValueError(f"layer norm over {step.shape} cannot be applied to what comes back, shape {shape}")
        else:
            _check_norm(step, own, channels)


def _check_norm(step: Norm, own: Sequence[Tensor | None], channels: int) -> None:
    for name, t in zip(("scale", "shift", "mean", "variance"), own, strict=True):
        if t is not None and t.numel() != channels:
            raise ValueError(f"the {step.kind} norm's {name} has {t.numel()} values, its input {channels} channels")
    if step.running and (own[2] is None or own[3] is None):
        raise ValueError("a norm with running statistics needs their mean and variance, got None")
    if step.kind == "group" and channels % step.groups:
        raise ValueError(f"group norm: {channels} channels do not divide into {step.groups} groups")
