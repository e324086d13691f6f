"""Reverse layers as functions: the public face of the operator in `ops.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import chain_ops, describe, linear_chain, ops, tape
from .backends import Query, choose
from .checks import check, check_chain, check_sequences, check_tensors
from .descriptions import check_layers
from .layer import Chain, Latent, Layer, Segment, Tied

REDUCTIONS = ("l2", "sum", "mean")
MEMORY = ("store", "recompute")


def loss_factor(reduction: str, elements: int) -> float:
    """What Σ(·)² is multiplied by: ½ for `l2`, 1 for `sum`, 1/elements for `mean`."""
    return {"l2": 0.5, "sum": 1.0, "mean": 1.0 / elements}[reduction]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def reverse_layers(
    segment: Segment,
    y: Tensor,
    targets: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
    *,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Runs several reverse layers, each the source of the next; all that is public here rests on it.

    Args:
        segment: what is not a tensor, the highest layer first.
        y: source of the first, before `segment.undo`.
        targets, weights, biases: one per layer.
        params: the tensors of all latents, one layer after the other.
        keep: False keeps nothing for the backward and computes the segment again there.

    Returns:
        a of the last layer (its `pre` not undone), and Σ (target - undo(a))² of every layer, float32 or wider.
    """
    if not torch.compiler.is_compiling():
        check_layers(segment.layers, ())
    y, weights, biases = autocast(y, weights, biases)
    keep = keep and torch.is_grad_enabled()
    a, losses, _ = torch.ops.racecar.reverse_layers(
        y, list(targets), list(weights), list(biases), list(params), str(segment), keep
    )
    return a, losses


def autocast(
    y: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Under autocast, casts what autocast casts for a convolution; the gradients find their way back."""
    kind = y.device.type
    # there is no autocast on "meta"; torch.amp.is_autocast_available would say so, but PyTorch 2.11 cannot trace it
    if kind == "meta" or not torch.is_autocast_enabled(kind) or y.dtype == torch.float64:
        return y, list(weights), list(biases)
    dtype = torch.get_autocast_dtype(kind)
    return y.to(dtype), [w.to(dtype) for w in weights], [None if b is None else b.to(dtype) for b in biases]


def reverse_layer(
    y: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    pre: Sequence[nn.Module] = (),
    latent: Sequence[nn.Module] = (),
    undo: Sequence[nn.Module] = (),
    norm: str = "batch",
    reduction: str = "l2",
    memory: str = "store",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The reverse of one layer, and how far it is from what the layer received.

        s = undo(y) - bias,  u = Wᵀ s,  a = latent(u),  loss = reduction(target - undo_pre(a))

    (Xie & Thuerey et al. 2020, Eq. 3; 2021, Eq. 24.) The operation is the exact adjoint of the forward convolution or
    linear map with these settings. The difference is never materialised; one tensor is kept for the backward.

    Args:
        y: what the layer gave, (N, C_out, *spatial) or (..., out_features); or a tensor from which `undo` leads there.
        target: what the layer received, before `pre`: (N, C_in, *spatial) or (..., in_features).
        weight: (C_out, C_in/groups, *kernel) of a 1d, 2d or 3d convolution, or (out_features, in_features).
        bias: (C_out,), subtracted from the source; None if the layer has none.
        stride, padding, dilation, groups, padding_mode: as in `torch.nn.Conv2d`; ignored by a linear weight.
        pre: modules between target and the operation: pooling, nearest `Upsample`, dropout.
        latent: modules applied to u: norms and activations, in their forward order.
        undo: `pre` of the layer above, if y is that layer's `a`: then the up-sampling is folded into the convolution.
        norm: statistics of batch norms in training mode: `batch` (of u) or `running`.
        reduction: `l2` = ½·Σ(·)², `sum` = Σ(·)², `mean` = mean(·)².
        memory: `store` keeps one tensor, `recompute` none.
        backend: name of one of `backends(on_request=True)`; None chooses.

    Returns:
        a, with the shape in which the operation saw its input, and the loss, a scalar in float32 or wider.

    Raises:
        ValueError: shapes, devices or settings that do not fit, an empty batch; the message says what would.
        TypeError: something that is not a dense, real floating-point tensor; weight or bias of another dtype than y
            (target may be wider, as under autocast); a single module or a class where a sequence of modules belongs.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("memory", memory, MEMORY)
    check_choice("norm", norm, ("batch", "running"))
    check_tensors(y=y, target=target, weight=weight, **({} if bias is None else {"bias": bias}))
    for name, modules in (("pre", pre), ("latent", latent), ("undo", undo)):
        _check_modules(name, modules)
    dims = weight.dim() - 2
    if dims not in (0, 1, 2, 3):
        raise ValueError(f"weight must have 2 dimensions (linear) or 3 to 5 (convolution), got {tuple(weight.shape)}")
    tied = Tied()
    if dims:
        tied = _convolution(weight, stride, padding, dilation, groups, padding_mode)
    steps = [describe.latent_of(m, norm) for m in latent]
    layer = Layer(tied, describe.steps_of(pre, dims), tuple(s for s in steps if s is not None))
    segment = Segment((layer,), describe.steps_of(undo, dims), backend)
    choose(Query(layer, y.device.type, y.dtype), backend)  # a forced backend refuses before anything is computed
    params = [t for m, s in zip(latent, steps, strict=True) for t in describe.latent_tensors(m, s)]
    a, losses = reverse_layers(segment, y, [target], [weight], [bias], params, keep=memory == "store")
    return a, losses[0] * loss_factor(reduction, target.numel())


def _check_modules(name: str, modules: Any) -> None:
    if isinstance(modules, nn.Module) and not isinstance(modules, (nn.Sequential, nn.ModuleList)):
        raise TypeError(f"{name} must be a sequence of modules, got {modules}; write {name}=[{modules}]")
    for module in modules:
        if not isinstance(module, nn.Module):
            hint = f"; write {module.__name__}()" if isinstance(module, type) else ""
            raise TypeError(f"{name} must hold modules, got {module!r}{hint}")


def _whole_numbers(name: str, value: Any, dims: int, least: int) -> tuple[int, ...]:
    """One number, or one per spatial dimension, each at least `least`."""
    numbers = (value,) * dims if isinstance(value, int) else value
    if (
        not isinstance(numbers, Sequence)
        or len(numbers) != dims
        or any(not isinstance(n, int) or isinstance(n, bool) or n < least for n in numbers)
    ):
        raise ValueError(f"{name} must be a whole number of at least {least}, or {dims} of them, got {value!r}")
    return tuple(numbers)


def _convolution(weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, mode: str) -> Tied:
    check_choice("padding_mode", mode, ("zeros", "reflect", "replicate", "circular"))
    dims = weight.dim() - 2
    stride, dilation = _whole_numbers("stride", stride, dims, 1), _whole_numbers("dilation", dilation, dims, 1)
    (groups,) = _whole_numbers("groups", groups, 1, 1)
    if isinstance(padding, str):
        check_choice("padding", padding, ("same", "valid"))
        if padding == "same" and max(stride) > 1:
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
    else:
        padding = _whole_numbers("padding", padding, dims, 0)
    pairs = describe.padding_pairs(padding, tuple(weight.shape[2:]), dilation)
    return Tied(stride, pairs, dilation, groups, mode)


def deferred_layer(
    segment: Segment,
    y: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    params: Sequence[Tensor | None],
    report: ops.Report,
) -> tuple[Tensor, Tensor]:
    """One reverse layer that is computed in the backward pass only, and keeps nothing of its own.

    Put it directly behind the layer, and go on with the tensor that it returns (y's values and memory): the engine
    then runs it just before that layer's own backward, and adds both gradients in one place.

    Where nothing needs a gradient, the loss is computed at once.

    Returns:
        y for the rest of the network, and a scalar 0 that stands for Σ (target - undo(a))²: whatever gradient reaches
        it is the weight of this layer's gradients. `report.loss` holds the sum after the backward pass.
    """
    if len(segment.layers) != 1:
        raise ValueError(f"a deferred segment holds one layer, got {len(segment.layers)}")
    if torch.compiler.is_compiling():
        raise RuntimeError("memory='deferred' does not work under torch.compile yet; use 'recompute' or 'store'")
    if not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in (y, target, weight, bias, *params)
    ):
        _, losses = reverse_layers(segment, y, [target], [weight], [bias], params, keep=False)
        report.loss = losses[0].detach()  # no backward will reach it
        return y, torch.zeros_like(report.loss)
    source, (weight,), (bias,) = autocast(y, [weight], [bias])
    check(segment, source, [target], [weight], [bias], params)
    return ops.Deferred.apply(
        str(segment), report, y if source is not y else None, source, target, weight, bias, *params
    )


def tied_chain(
    x: Tensor,
    layers: Sequence[Layer],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    params: Sequence[Tensor | None] = (),
    *,
    last: Sequence[Latent] = (),
    variant: str = "full",
    memory: str = "store",
    backend: str | None = None,
    report: chain_ops.ChainReport | None = None,
) -> tuple[Tensor, Tensor]:
    """A chain of layers and its reverse pass in one autograd node, which keeps little.

        d_{m+1} = φ_m(W_m pre_m(d_m) + b_m),   a_m = φ_{m-1}(W_mᵀ(y_m - b_m)),   loss_m = Σ (d_m - undo_m(a_m))²

    (Xie & Thuerey et al. 2020, Eq. 3.) Values and gradients are those of the plain forward and then `reverse_layers`.

    Args:
        x: d_1, (N, C, *spatial) or (..., features).
        layers: m = 1 first; the `latent` of a layer is φ of the layer below it, that of the first acts on the reverse
            alone and takes no tensors.
        weights, biases: one per layer.
        params: the tensors of φ_1 .. φ_n, one layer after the other.
        last: φ_n.
        variant: `full`: every reverse begins where the one above ended, the first one at the output; `local`: at what
            its own layer gave.
        memory: `store` keeps one tensor per layer for the reverse, `recompute` none; `deferred` (local) runs the whole
            reverse in the backward pass.
        backend: name of one of `backends(on_request=True)` for the reverse layers; None chooses.
        report: receives the losses of a deferred chain, and the statistics that its batch norms took of the batch.

    Returns:
        d_{n+1}, and the losses, (n,) in float32 or wider; 0 while they are deferred.

    Raises:
        ValueError, TypeError: as `reverse_layer`; a pooling whose forward is not known here; deferred and full.

    Example:
        >>> tied = rk.Tied(stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))  # a 3x3 convolution
        >>> relu, pool = rk.Activation("relu"), rk.Pool((2, 2), (2, 2), (0, 0), (1, 1))
        >>> layers = [rk.Layer(tied), rk.Layer(tied, pre=(pool,), latent=(relu,))]  # conv, relu, pool, conv, relu
        >>> out, losses = rk.tied_chain(x, layers, [w1, w2], [b1, b2], last=[relu])
        >>> (task(out) + 1e-5 * losses.sum() / 2).backward()
    """
    check_choice("variant", variant, ("full", "local"))
    check_choice("memory", memory, (*MEMORY, "deferred"))
    check_tensors(x=x)
    check_layers(layers, last)
    check_sequences(weights=weights, biases=biases, params=params)
    chain = Chain(tuple(layers), tuple(last), variant == "full", backend)
    return run_chain(chain, str(chain), x, weights, biases, params, memory=memory, report=report)


MOST_CHECKED = 1024
_CHECKED: set[tuple[Any, ...]] = set()


def _look(t: Tensor | None) -> Any:
    """All that `check_chain` asks of a tensor."""
    return None if t is None else (t.shape, t.dtype, t.device, t.layout)


def run_chain(
    chain: Chain,
    text: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    params: Sequence[Tensor | None],
    *,
    memory: str,
    report: chain_ops.ChainReport | None,
) -> tuple[Tensor, Tensor]:
    """`tied_chain` of a chain whose description is kept from call to call; `text` is str(chain)."""
    if memory == "deferred" and chain.full:
        raise ValueError("memory='deferred' needs variant='local': a full reverse can use 'store' or 'recompute'")
    compiling = torch.compiler.is_compiling()
    if not compiling and not params:
        ran = linear_chain.apply(text, x, weights, biases, memory, report)
        if ran is not None:
            if report is not None:
                report.losses = ran[1] if memory == "deferred" and not ran[1].requires_grad else None
            return ran
    flat = (x, *weights, *biases, *params)
    plain = not compiling and all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in flat)
    seen = (text, len(weights), len(biases), *map(_look, flat)) if plain else None
    if seen is None or seen not in _CHECKED:  # a training loop asks the same at every step
        check_chain(chain, x, weights, biases, params)
        if len(_CHECKED) >= MOST_CHECKED:
            _CHECKED.clear()
        if seen is not None:
            _CHECKED.add(seen)
    differentiated = any(t is not None and t.requires_grad for t in flat) and torch.is_grad_enabled()
    if memory == "deferred" and differentiated and compiling:
        raise RuntimeError("memory='deferred' does not work under torch.compile yet; use 'recompute' or 'store'")
    if differentiated and (memory == "deferred" or (plain and not tape.is_watched(flat))):
        out, losses, *stats = chain_ops.TiedChain.apply(text, memory, report, len(weights), *flat)
    else:
        policy = "recompute" if memory == "deferred" else memory  # no backward will come: the losses are found at once
        out, losses, stats, _, _ = torch.ops.racecar.tied_chain(
            x, list(weights), list(biases), list(params), text, policy
        )
    if report is not None:
        report.stats = stats
        report.losses = losses if memory == "deferred" and not differentiated else None
    return out, losses
