"""From modules of `torch.nn` to the values of `layer.py`, and their tensors: the one list of what is served.

Subclasses count as their base only while they keep its `forward`: another forward is another operation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .activations import BY_MODULE, TABLE
from .layer import Activation, Latent, Norm, Pool, Step, Tied, Upsample

TIED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MAX_POOLS: dict[type[nn.Module], int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_AVG_POOLS: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
PRE = (*_MAX_POOLS, *_AVG_POOLS, nn.Upsample, nn.UpsamplingNearest2d)
NORMS = (*_BATCH, *_INSTANCE, nn.GroupNorm, nn.LayerNorm)
ACTIVATIONS = tuple(BY_MODULE)


class UnsupportedError(ValueError):
    """This module has no reverse here; the message says why."""


def is_a(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether `module` computes what one of `kinds` does."""
    return _kind(module, kinds) is not None


def _kind(module: nn.Module, kinds: Any) -> Any:
    return next((k for k in kinds if isinstance(module, k) and type(module).forward is k.forward), None)


def tied_of(module: nn.Module) -> Tied:
    """The tied operation of a Linear or ConvNd. Raises UnsupportedError for anything else."""
    kind = _kind(module, TIED)
    if kind is None:
        raise UnsupportedError(f"{type(module).__name__} is not a Linear, Conv1d, Conv2d or Conv3d")
    if kind is nn.Linear:
        return Tied()
    m: Any = module
    return Tied(m.stride, padding_pairs(m.padding, m.kernel_size, m.dilation), m.dilation, m.groups, m.padding_mode)


def padding_pairs(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(before, after) of every spatial dimension."""
    if padding == "valid":
        return ((0, 0),) * len(kernel)
    if padding == "same":  # what is left over is added behind, as in torch.nn
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    return tuple((p, p) for p in padding)


def step_of(module: nn.Module) -> Step | None:
    """Pooling or up-sampling in front of a tied operation; None for dropout and identity, which the reverse skips."""
    if is_a(module, (*DROPOUTS, nn.Identity)):
        return None
    m: Any = module
    if is_a(module, (nn.Upsample, nn.UpsamplingNearest2d)):
        return _upsample(m)
    kind = _kind(module, (*_MAX_POOLS, *_AVG_POOLS))
    if kind is None:
        raise UnsupportedError(f"{type(module).__name__} is no pooling or up-sampling that can be undone")
    if getattr(m, "return_indices", False):
        raise UnsupportedError(f"{type(module).__name__} with return_indices=True gives a tuple")
    dims = _MAX_POOLS[kind] if kind in _MAX_POOLS else _AVG_POOLS[kind]
    kernel, stride, padding = each(m.kernel_size, dims), each(m.stride, dims), each(m.padding, dims)
    plain = getattr(m, "count_include_pad", True) and getattr(m, "divisor_override", None) is None
    mode = "max" if kind in _MAX_POOLS else "average" if plain else "other"
    return Pool(kernel, stride, padding, each(getattr(m, "dilation", 1), dims), m.ceil_mode, mode)


def _upsample(m: Any) -> Upsample:
    if m.mode not in ("nearest", "nearest-exact"):
        raise UnsupportedError(f"Upsample with mode={m.mode!r}; only nearest up-sampling can be undone")
    if m.scale_factor is None:
        raise UnsupportedError("Upsample with size=; only scale_factor= says by how much")
    # as many trailing dimensions as there are factors; one factor means all spatial ones, filled in by `steps_of`
    factors = m.scale_factor if isinstance(m.scale_factor, tuple) else (m.scale_factor,)
    if any(f != int(f) or f < 1 for f in factors):
        raise UnsupportedError(f"Upsample with scale_factor={m.scale_factor}; only whole factors can be undone")
    return Upsample(tuple(int(f) for f in factors))


def steps_of(modules: Iterable[nn.Module], dims: int) -> tuple[Step, ...]:
    """The steps of `pre`; an up-sampling by one factor has that factor in every of `dims` spatial dimensions."""
    steps = [step for step in map(step_of, modules) if step is not None]
    if steps and dims == 0:
        raise UnsupportedError("pooling or up-sampling in front of a Linear; the sizes that it acts on are not spatial")
    steps = [Upsample(s.factor * dims) if isinstance(s, Upsample) and len(s.factor) == 1 else s for s in steps]
    for step in steps:
        found = len(step.factor if isinstance(step, Upsample) else step.kernel)
        if found != dims:
            raise UnsupportedError(f"{found}d pooling or up-sampling in front of a {dims}d convolution")
    return tuple(steps)


def each(value: Any, dims: int) -> tuple[int, ...]:
    """One number, or one per dimension, as a tuple of `dims`."""
    return (value,) * dims if isinstance(value, int) else tuple(value)


def latent_of(module: nn.Module, norm: str = "batch") -> Latent | None:
    """A norm or activation, with `norm` saying which statistics a batch norm in training mode uses; None for no-ops."""
    if is_a(module, (*DROPOUTS, nn.Identity)):
        return None
    m: Any = module
    if is_a(module, _BATCH) or is_a(module, _INSTANCE):
        running = m.running_mean is not None and (norm == "running" or not m.training)
        if is_a(module, _INSTANCE) and not running:
            return Norm("group", m.eps, groups=m.num_features)
        return Norm("batch", m.eps, running)
    if is_a(module, (nn.GroupNorm,)):
        return Norm("group", m.eps, groups=m.num_groups)
    if is_a(module, (nn.LayerNorm,)):
        return Norm("layer", m.eps, shape=tuple(m.normalized_shape))
    kind = _kind(module, ACTIVATIONS)
    if kind is not None:
        name = BY_MODULE[kind]
        return Activation(name, TABLE[name].args(m))
    if isinstance(module, nn.RReLU):
        raise ValueError("RReLU draws random slopes, which the reverse cannot repeat; use LeakyReLU or PReLU")
    if isinstance(module, nn.SyncBatchNorm):
        raise UnsupportedError(
            "SyncBatchNorm takes its statistics over all processes, which the reverse pass does not; BatchNorm and "
            "GroupNorm can be run backwards"
        )
    raise UnsupportedError(f"{type(module).__name__} is no norm or elementwise activation, and cannot be run backwards")


def latent_tensors(module: nn.Module, latent: Latent | None) -> list[Tensor | None]:
    """The tensors of one latent step. Running statistics are copied: the next forward changes them in place."""
    m: Any = module
    if latent is None:
        return []
    if isinstance(latent, Activation):
        return [m.weight] if latent.tensors else []
    statistics = [m.running_mean.clone(), m.running_var.clone()] if latent.running else [None, None]
    return [getattr(m, "weight", None), getattr(m, "bias", None), *statistics]
