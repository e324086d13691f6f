"""What describes no layer: values that no tensor can mend, each refused with a sentence that says what would do.

`describe.py` makes right ones of modules; these are for who makes a `Layer` by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .activations import TABLE
from .layer import Activation, Layer, Norm, Pool, Step, Tied, Upsample

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
POOLINGS = ("max", "average", "other")
NORMS = ("batch", "group", "layer")


def check_layers(layers: object, last: object) -> None:
    """Raises TypeError or ValueError for what describes no chain: modules, for example, or an activation of no name."""
    for name, values, kinds in (("layers", layers, (Layer,)), ("last", last, (Activation, Norm))):
        if not isinstance(values, Sequence):
            raise TypeError(f"{name} must be a sequence, got {type(values).__name__}")
        for value in values:
            _check_kind(name, value, kinds)
    given: Sequence[Layer] = layers  # type: ignore[assignment]
    for m, layer in enumerate(given, 1):
        _check_layer(f"layer {m}: ", layer)
    _check_latents("last: ", last)


def _check_kind(name: str, value: object, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(
            f"{name} holds {wanted} of racecar_kernels, got {type(value).__name__}; racecar.wrap takes modules"
        )


def _check_layer(at: str, layer: Layer) -> None:
    _check_kind(f"{at}tied", layer.tied, (Tied,))
    _check_tied(at, layer.tied)
    if not isinstance(layer.pre, tuple):
        raise TypeError(f"{at}pre must be a tuple of Pool and Upsample, got {layer.pre!r}")
    for step in layer.pre:
        _check_kind(f"{at}pre", step, (Pool, Upsample))
        _check_step(at, step, layer.tied.dims)
    _check_latents(f"{at}latent: ", layer.latent)


def _check_tied(at: str, tied: Tied) -> None:
    if all(value == () for value in (tied.stride, tied.padding, tied.dilation)):
        return  # linear, and the rest means nothing
    _check_numbers(f"{at}stride", tied.stride, None, 1)
    if tied.dims not in (1, 2, 3):
        raise ValueError(f"{at}stride must have 1 to 3 numbers, or none for a linear layer, got {tied.stride}")
    _check_numbers(f"{at}dilation", tied.dilation, tied.dims, 1)
    _check_number(f"{at}groups", tied.groups)
    pairs = tied.padding
    if not isinstance(pairs, tuple) or len(pairs) != tied.dims or not all(isinstance(p, tuple) for p in pairs):
        raise ValueError(f"{at}padding must be {tied.dims} pairs (before, after), got {pairs!r}")
    for pair in pairs:
        _check_numbers(f"{at}padding (before, after)", pair, 2, 0)
    if tied.padding_mode not in PADDING_MODES:
        raise ValueError(
            f"{at}padding_mode must be one of {', '.join(map(repr, PADDING_MODES))}, got {tied.padding_mode!r}"
        )


def _check_step(at: str, step: Step, dims: int) -> None:
    sizes = step.factor if isinstance(step, Upsample) else step.kernel
    what = "up-sampling" if isinstance(step, Upsample) else "pooling"
    found = len(sizes) if isinstance(sizes, tuple) else 0
    if dims == 0:
        raise ValueError(f"{at}{what} in front of a linear layer, whose input has no spatial sizes, got {step}")
    if found != dims:
        raise ValueError(f"{at}{found}d {what} in front of a {dims}d convolution; {dims}d would be right, got {step}")
    if isinstance(step, Upsample):
        _check_numbers(f"{at}factor of the up-sampling", step.factor, dims, 1)
        return
    for name, least in (("kernel", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        _check_numbers(f"{at}{name} of the pooling", getattr(step, name), dims, least)
    for k, p in zip(step.kernel, step.padding, strict=True):
        if p > k // 2:
            raise ValueError(f"{at}padding of the pooling can be at most half its kernel, {k // 2}, got {p}")
    if step.mode not in POOLINGS:
        raise ValueError(f"{at}mode of the pooling must be one of {', '.join(map(repr, POOLINGS))}, got {step.mode!r}")


def _check_latents(at: str, latents: Any) -> None:
    if not isinstance(latents, Sequence):
        raise TypeError(f"{at}must be a tuple of Activation and Norm, got {latents!r}")
    for step in latents:
        _check_kind(at.rstrip(": "), step, (Activation, Norm))
        if isinstance(step, Activation):
            _check_activation(at, step)
        elif step.kind not in NORMS:
            raise ValueError(f"{at}no norm is of the kind {step.kind!r}; there are {', '.join(NORMS)}")
        elif step.kind == "group":
            _check_number(f"{at}groups of the norm", step.groups)


def _check_activation(at: str, step: Activation) -> None:
    if step.name not in TABLE:
        raise ValueError(f"{at}no activation is named {step.name!r}; there are {', '.join(TABLE)}")
    names = TABLE[step.name].settings
    if not isinstance(step.args, tuple) or len(step.args) != len(names):
        right = f"({', '.join(names)}{',' * (len(names) == 1)})"
        raise ValueError(f"{at}the args of {step.name} are {right}, got {step.args!r}")
    for name, value in zip(names, step.args, strict=True):
        if name == "approximate":
            if value not in ("none", "tanh"):
                raise ValueError(f"{at}approximate of {step.name} must be 'none' or 'tanh', got {value!r}")
        elif not isinstance(value, (int, float)):
            raise ValueError(f"{at}{name} of {step.name} must be a number, got {value!r}")


def _check_numbers(name: str, values: Any, count: int | None, least: int) -> None:
    """A tuple of whole numbers; `count` None: as many as there are."""
    whole = isinstance(values, tuple) and all(isinstance(n, int) and not isinstance(n, bool) for n in values)
    if not whole or (count is not None and len(values) != count) or any(n < least for n in values):
        some = "whole numbers" if count is None else f"{count} whole numbers"
        raise ValueError(f"{name} must be a tuple of {some} of at least {least}, got {values!r}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
