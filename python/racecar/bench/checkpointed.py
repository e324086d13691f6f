"""The reverse pass in plain PyTorch with activation checkpointing: memory first, as an expert writes it.

One checkpoint per layer and direction. What stays alive is what a layer received, d_m, and (full) what came back to it
before its pooling is undone, a_m: undoing it, the residual and the next transposed operation are one checkpoint, so
that nothing at the full resolution crosses from one to the next. Everything else is computed again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .plain import Layer, l2, layers_of, run_back, run_forward, undo


def forward_and_losses(
    net: nn.Sequential,
    x: Tensor,
    variant: str,
    *,
    layers: list[Layer] | None = None,
    input_activation: nn.Module | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """As `plain.forward_and_losses`, keeping less and computing more.

    The forward of a batch norm runs twice per step, and so does the update of its running statistics.
    """
    layers = layers_of(net) if layers is None else layers
    d: list[Tensor] = [x]
    sizes: list[list[torch.Size]] = []
    for layer in layers:
        out, seen = _again(layer, run_forward, layer, d[-1])
        d.append(out)
        sizes.append(seen)

    def one(y: Tensor, target: Tensor, m: int) -> Tensor:
        a = run_back(layers, m, y, sizes[m], input_activation)
        return l2(undo(layers[m].pre, a, sizes[m]), target)

    def top(y: Tensor) -> Tensor:
        return run_back(layers, len(layers) - 1, y, sizes[-1], input_activation)

    def compared_then_back(a: Tensor, target: Tensor, m: int) -> tuple[Tensor, Tensor]:
        source = undo(layers[m + 1].pre, a, sizes[m + 1])
        return l2(source, target), run_back(layers, m, source, sizes[m], input_activation)

    def compared(a: Tensor, target: Tensor) -> Tensor:
        return l2(undo(layers[0].pre, a, sizes[0]), target)

    n = len(layers)
    if variant == "local":
        return d[-1], [_again(None, one, d[m + 1], d[m], m) for m in range(n)]
    losses: list[Tensor] = []
    a = _again(None, top, d[-1])
    for m in range(n - 2, -1, -1):
        loss, a = _again(None, compared_then_back, a, d[m + 1], m)
        losses.append(loss)
    losses.append(_again(None, compared, a, d[0]))
    return d[-1], losses[::-1]


def _again(layer: Layer | None, run: Callable[..., Any], *arguments: Any) -> Any:
    """`run(*arguments)`, now and again in the backward pass, with the same random state where the layer draws on it."""
    random = layer is not None and any(isinstance(module, nn.Dropout) for module in (*layer.pre, *layer.latent))
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=random)
