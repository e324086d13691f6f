"""What a call of a PyTorch function is to the reverse pass: the one table from functions to modules that describe them.

A forward may be made of modules, functions (`F.relu`) or methods (`x.relu()`); the modules of `torch.nn` call functions
themselves, one each. So functions are what is looked at. What `racecar_kernels.describe` knows are modules: a call is
turned into the module that would have made it, without its tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from racecar_kernels import describe
from racecar_kernels.activations import TABLE


class Family(Enum):
    """How the planner and the runner treat a call; the input is always its first argument."""

    TIED = "tied"
    LATENT = "latent"
    PRE = "pre"
    SILENT = "silent"
    PAD = "pad"
    OTHER = "other"


def _arguments(names: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name; `names` in the order of the function's own."""
    return {**dict(zip(names.split(), args, strict=False)), **kwargs}


# ------------------------------------------------------------------------------------------ norms and activations

_ACTIVATIONS: dict[Any, str] = {}
for _name, _row in TABLE.items():
    for _owner in (F, torch, Tensor):
        for _spelling in (_name, _name.replace("log_sigmoid", "logsigmoid")):
            for _found in (getattr(_owner, _spelling, None), getattr(_owner, f"{_spelling}_", None)):
                if _found is not None:
                    _ACTIVATIONS[_found] = _name


def _activation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    row = TABLE[_ACTIVATIONS[func]]
    given = _arguments(" ".join(("input", *row.settings)), args, kwargs)
    own = {name: given[name] for name in row.settings if name in given}
    if own == {"min_val": 0.0, "max_val": 6.0}:  # what nn.ReLU6 calls
        return nn.ReLU6()
    return row.module(**own)


_NORM_ARGUMENTS: dict[Any, str] = {
    F.batch_norm: "input running_mean running_var weight bias training momentum eps",
    F.instance_norm: "input running_mean running_var weight bias use_input_stats momentum eps",
    F.group_norm: "input num_groups weight bias eps",
    F.layer_norm: "input normalized_shape weight bias eps",
}


def norm_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Scale, shift, running mean and variance that a norm was called with."""
    given = _arguments(_NORM_ARGUMENTS[func], args, kwargs)
    return given.get("weight"), given.get("bias"), given.get("running_mean"), given.get("running_var")


def in_training(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a norm was called to take statistics of its input."""
    given = _arguments(_NORM_ARGUMENTS[func], args, kwargs)
    if func is F.batch_norm:
        return bool(given.get("training", False))
    return bool(given.get("use_input_stats", True))


def _norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    given = _arguments(_NORM_ARGUMENTS[func], args, kwargs)
    eps = given.get("eps", 1e-5)
    if func is F.group_norm:
        return nn.GroupNorm(given["num_groups"], given["num_groups"], eps, affine=False)
    if func is F.layer_norm:
        return nn.LayerNorm(tuple(given["normalized_shape"]), eps, elementwise_affine=False)
    channels = given["input"].shape[1] if isinstance(given["input"], Tensor) else 1
    kind = nn.BatchNorm2d if func is F.batch_norm else nn.InstanceNorm2d
    norm = kind(channels, eps, affine=False, track_running_stats=given.get("running_mean") is not None)
    return norm.train(in_training(func, args, kwargs))


# ------------------------------------------------------------------------------------------ pooling, dropout

_POOL_ARGUMENTS = {
    "max": "input kernel_size stride padding dilation ceil_mode return_indices",
    "avg": "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
}
_POOLS: dict[Any, tuple[str, type[nn.Module]]] = {
    F.max_pool1d: ("max", nn.MaxPool1d),
    F.max_pool2d: ("max", nn.MaxPool2d),
    F.max_pool3d: ("max", nn.MaxPool3d),
    torch.max_pool1d: ("max", nn.MaxPool1d),
    torch.max_pool2d: ("max", nn.MaxPool2d),
    torch.max_pool3d: ("max", nn.MaxPool3d),
    F.avg_pool1d: ("avg", nn.AvgPool1d),
    F.avg_pool2d: ("avg", nn.AvgPool2d),
    F.avg_pool3d: ("avg", nn.AvgPool3d),
}


def _pool(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    name, module = _POOLS[func]
    given = _arguments(_POOL_ARGUMENTS[name], args, kwargs)
    del given["input"]
    return module(**given)


def _interpolate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    names = "input size scale_factor mode align_corners recompute_scale_factor antialias"
    given = _arguments(names, args, kwargs)
    factor = given.get("scale_factor")
    return nn.Upsample(
        given.get("size"), tuple(factor) if isinstance(factor, list) else factor, given.get("mode", "nearest")
    )


_DROPOUTS = [
    getattr(owner, name + ending)
    for owner in (F, torch)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    for ending in ("", "_")
    if hasattr(owner, name + ending)
]


# ------------------------------------------------------------------------------------------ tied operations

_CONVOLUTIONS = {
    function: kind
    for functions, kind in (
        ((F.conv1d, torch.conv1d), nn.Conv1d),
        ((F.conv2d, torch.conv2d), nn.Conv2d),
        ((F.conv3d, torch.conv3d), nn.Conv3d),
    )
    for function in functions
}
_TIED_ARGUMENTS = "input weight bias stride padding dilation groups"


def tied_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a tied operation."""
    given = _arguments(_TIED_ARGUMENTS, args, kwargs)
    return given["input"], given["weight"], given.get("bias")


def _tied(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    given = _arguments(_TIED_ARGUMENTS, args, kwargs)
    weight = given["weight"]
    if func is F.linear:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    groups = given.get("groups", 1)
    own = {k: _same_type(given[k]) for k in ("stride", "padding", "dilation") if k in given}
    sizes = (weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]))
    return _CONVOLUTIONS[func](*sizes, **own, groups=groups, bias=False, device="meta")


def _same_type(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, torch.Size)) else value


# ------------------------------------------------------------------------------------------ the table

FAMILIES: dict[Any, Family] = {
    **dict.fromkeys(_ACTIVATIONS, Family.LATENT),
    **dict.fromkeys(_NORM_ARGUMENTS, Family.LATENT),
    **dict.fromkeys(_POOLS, Family.PRE),
    F.interpolate: Family.PRE,
    **dict.fromkeys(_DROPOUTS, Family.SILENT),
    **dict.fromkeys(_CONVOLUTIONS, Family.TIED),
    F.linear: Family.TIED,
    F.pad: Family.PAD,
}
_CALLED: tuple[tuple[tuple[type[nn.Module], ...], Any], ...] = (
    *(((row.module,), getattr(F, name.replace("log_sigmoid", "logsigmoid"))) for name, row in TABLE.items()),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), F.batch_norm),
    ((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), F.instance_norm),
    ((nn.GroupNorm,), F.group_norm),
    ((nn.LayerNorm,), F.layer_norm),
    *(((module,), function) for function, (_, module) in _POOLS.items()),
    ((nn.Upsample, nn.UpsamplingNearest2d), F.interpolate),
)
RANDOM = {F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_}
FAMILIES |= dict.fromkeys(RANDOM, Family.LATENT)
_MAKERS: dict[Any, Callable[..., nn.Module]] = {
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **dict.fromkeys(_NORM_ARGUMENTS, _norm),
    **dict.fromkeys(_POOLS, _pool),
    F.interpolate: _interpolate,
    **dict.fromkeys(_CONVOLUTIONS, _tied),
    F.linear: _tied,
    **dict.fromkeys(RANDOM, lambda *given: nn.RReLU()),
}
_KINDS: dict[Any, str] = {
    **{f: "hardtanh" if name == "relu6" else name for f, name in _ACTIVATIONS.items()},  # nn.ReLU6 calls F.hardtanh
    **{f: f.__name__ for f in _NORM_ARGUMENTS},
    **{f: f"{name}_pool" for f, (name, _) in _POOLS.items()},
    F.interpolate: "interpolate",
}
SLOPED = {f for f, name in _ACTIVATIONS.items() if name == "prelu"}
NORMS = frozenset(_NORM_ARGUMENTS)


def kind_of(func: Any) -> str:
    """Which norm, activation or pooling a function is; its family's name for what is neither."""
    return _KINDS.get(func) or FAMILIES.get(func, Family.OTHER).value


def kind_of_module(module: nn.Module) -> str:
    """`kind_of` the function that a module of `torch.nn` calls."""
    for kinds, func in _CALLED:
        if describe.is_a(module, kinds):
            return kind_of(func)
    return Family.OTHER.value


def family_of_module(module: nn.Module) -> Family:
    """That of a module of `torch.nn`, which calls one function of the family."""
    for kinds, family in (
        (describe.TIED, Family.TIED),
        ((*describe.NORMS, *describe.ACTIVATIONS), Family.LATENT),
        (describe.PRE, Family.PRE),
        (describe.DROPOUTS, Family.SILENT),
    ):
        if describe.is_a(module, kinds):
            return family
    return Family.OTHER


def described(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """The module that would have made this call of a function in a family other than OTHER; its tensors are not set.

    Raises UnsupportedError where the arguments are not known before the forward runs.
    """
    maker = _MAKERS.get(func)
    if maker is None:
        return nn.Dropout() if func in _DROPOUTS else nn.Identity()
    try:
        return maker(func, args, kwargs)
    except (TypeError, ValueError, KeyError) as error:
        raise describe.UnsupportedError(f"{name_of(func)} was called with arguments of its own kind: {error}") from None


def name_of(func: Any) -> str:
    """What to call a function in a message."""
    return str(getattr(func, "__name__", func))


def works_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call changes its first argument."""
    name = name_of(func)
    if kwargs.get("inplace"):
        return True
    return (
        (name.endswith("_") and not name.endswith("__"))
        or func in _IN_PLACE
        or (name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__", "__int__"))
    )


_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem, Tensor.__setitem__)
