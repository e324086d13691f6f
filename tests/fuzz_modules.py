"""Layers for fuzzing, by name, and what they do by definition: for whatever sizes, one value per channel included."""

from __future__ import annotations

import copy

import torch
from oracle import shapes_through, transposed, undo
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
BATCH = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

STEPS = {
    "max 2": lambda dims: MAX_POOL[dims](2),
    "max 2 ceil": lambda dims: MAX_POOL[dims](2, ceil_mode=True),
    "max 3 stride 2 padding 1": lambda dims: MAX_POOL[dims](3, 2, 1),
    "max 2 stride 1 dilation 2": lambda dims: MAX_POOL[dims](2, 1, dilation=2),
    "max uneven": lambda dims: MAX_POOL[dims]((2, 3, 1)[:dims]),
    "max 1 stride 3": lambda dims: MAX_POOL[dims](1, 3),
    "average 2": lambda dims: AVG_POOL[dims](2),
    "average 2 stride 1 padding 1": lambda dims: AVG_POOL[dims](2, 1, 1),
    "average 2 ceil": lambda dims: AVG_POOL[dims](2, ceil_mode=True),
    "up 2": lambda dims: nn.Upsample(scale_factor=2),
    "up uneven": lambda dims: nn.Upsample(scale_factor=(1, 3, 2)[:dims] if dims > 1 else 3),
    "up 1": lambda dims: nn.Upsample(scale_factor=1),
    "dropout": lambda dims: nn.Dropout(0.0),
}
# With whole numbers these are exact: steps and halves.
PIECEWISE = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.5),
    "hardtanh": lambda: nn.Hardtanh(-2, 3),
    "softshrink": lambda: nn.Softshrink(1.0),
    "hardshrink": lambda: nn.Hardshrink(1.0),
    "threshold": lambda: nn.Threshold(1.0, -3.0),
    "inplace relu": lambda: nn.ReLU(inplace=True),
}
SMOOTH = {
    "leaky_relu, rising": lambda: nn.LeakyReLU(-0.1),
    "leaky_relu, 0": lambda: nn.LeakyReLU(0.0),
    "elu": lambda: nn.ELU(0.7),
    "elu, falling": lambda: nn.ELU(-0.5),
    "selu": nn.SELU,
    "celu": lambda: nn.CELU(0.5),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "log_sigmoid": nn.LogSigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "softplus": lambda: nn.Softplus(2.0, 5.0),
    "softsign": nn.Softsign,
    "tanhshrink": nn.Tanhshrink,
}
NAMED_NORMS = ("batch", "batch, eval", "batch, plain", "group", "instance", "instance, eval", "layer", "layer, plain")
LATENTS = (*PIECEWISE, *SMOOTH, "prelu", "prelu, one", "identity", "dropout", *NAMED_NORMS, "batch", "batch", "relu")


def steps(names: tuple[str, ...], dims: int, *, whole: bool) -> list[nn.Module]:
    """Pooling and up-sampling; none in front of a linear layer. `whole`: only what keeps whole numbers exact."""
    return [STEPS[name](dims) for name in names if dims and not (whole and name == "average 2 stride 1 padding 1")]


def latents(names: tuple[str, ...], dims: int, shape: tuple[int, ...], *, whole: bool) -> list[nn.Module]:
    """Norms and activations for a tensor of `shape`, in float64."""
    made = [_latent(name, dims, shape) for name in names if not whole or name in PIECEWISE or name.startswith("prelu")]
    return [module.double() for module in made]


def _latent(name: str, dims: int, shape: tuple[int, ...]) -> nn.Module:
    channels = shape[1] if len(shape) > 1 else shape[0]
    simple = {**PIECEWISE, **SMOOTH, "identity": nn.Identity, "dropout": lambda: nn.Dropout(0.0)}
    if name in simple:
        return simple[name]()
    if name.startswith("prelu"):
        return nn.PReLU(1 if "one" in name else channels)
    if name.startswith("batch") and len(shape) < 4 + (dims > 0) * 2:
        norm = BATCH[dims](channels, eps=0.01, affine="plain" not in name)
        return norm.eval() if "eval" in name else norm
    if name.startswith("instance") and dims:
        norm = INSTANCE[dims](channels, eps=0.01, affine=True, track_running_stats="eval" in name)
        return norm.eval() if "eval" in name else norm
    if name.startswith("layer"):
        return nn.LayerNorm(shape[-1:] if dims == 0 else shape[1:], eps=0.01, elementwise_affine="plain" not in name)
    if name == "group":
        return nn.GroupNorm(2 if channels % 2 == 0 else 1, channels, eps=0.01)
    return nn.Identity()


def fitting(modules: list[nn.Module], shape: tuple[int, ...]) -> list[nn.Module]:
    """The modules without those that plain PyTorch would refuse."""
    kept: list[nn.Module] = []
    for module in modules:
        if works([*kept, module], shape):
            kept.append(module)
    return kept


@torch.no_grad()
def works(modules: list[nn.Module], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of what plain PyTorch gives for an input of `shape`, None where it refuses or gives nothing."""
    modules = [copy.deepcopy(m).eval() if isinstance(m, NORMS) else m for m in modules]
    h = torch.zeros(shape, dtype=torch.float64)
    try:
        for module in modules:
            if 0 in h.shape:
                return None
            try:
                h = module(h)
            except ValueError as error:  # a matter of training, not of shapes: one value has a mean, too
                if "Expected more than 1" not in str(error):
                    return None
    except (RuntimeError, ValueError, IndexError):
        return None
    return None if 0 in h.shape else tuple(h.shape)


def apply_latent(modules: list[nn.Module], h: Tensor, norm: str = "batch", *, plain: bool = False) -> Tensor:
    """Norms and activations, from their definitions where torch.nn.functional has an opinion on sizes.

    plain: without the activations, and norms only divide. Nothing cancels or saturates, so that its size is that of
    the rounding errors, in units of the last place.
    """
    for module in modules:
        if isinstance(module, NORMS):
            h = _norm(module, h, norm, plain)
        elif not plain:
            h = module(h.clone())
    return h


def _norm(module: nn.Module, h: Tensor, norm: str, plain: bool) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        dims, weight, bias = tuple(range(-len(module.normalized_shape), 0)), module.weight, module.bias
        h = _normalised(h, dims, module.eps, plain)
        return h if weight is None else h * weight + bias
    along = (1, -1, *[1] * (h.dim() - 2))
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)
    running = not isinstance(module, nn.GroupNorm) and module.running_mean is not None
    if running and (norm == "running" or not module.training):
        h = (h - module.running_mean.view(along)) / (module.running_var.view(along) + module.eps).sqrt()
    elif batch:
        h = _normalised(h, (0, *range(2, h.dim())), module.eps, plain)
    else:
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else h.shape[1]
        h = _normalised(h.reshape(h.shape[0], groups, -1), (2,), module.eps, plain).view(h.shape)
    return h if module.weight is None else h * module.weight.view(along) + module.bias.view(along)


def _normalised(h: Tensor, dims: tuple[int, ...], eps: float, plain: bool) -> Tensor:
    deviation = (h.var(dims, correction=0, keepdim=True) + eps).sqrt()
    return h / deviation.detach() if plain else (h - h.mean(dims, keepdim=True)) / deviation


def reversed_once(
    op: nn.Module, y: Tensor, seen: torch.Size, latent: list[nn.Module], norm: str = "batch", *, plain: bool = False
) -> Tensor:
    """a = φ(Wᵀ (y - b)) of the shape in which the operation saw its input."""
    if op.bias is not None:
        y = y - (op.bias if isinstance(op, nn.Linear) else op.bias.view(-1, *[1] * (y.dim() - 2)))
    return apply_latent(latent, transposed(op, y, seen), norm, plain=plain)


def residual(target: Tensor, pre: list[nn.Module], a: Tensor) -> Tensor:
    """d - undo(a)."""
    return target - undone(pre, a, target.shape)


def undone(pre: list[nn.Module], h: Tensor, shape: torch.Size) -> Tensor:
    return undo(pre, h, shapes_through(pre, shape)[:-1])


def set_tensors(modules: list[nn.Module], tensors: list[Tensor]) -> None:
    """Puts tensors, of any strides and graph, where the modules have their parameters."""
    left = iter(tensors)
    for module in modules:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = next(left)
