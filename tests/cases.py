"""The one list of reverse layers that the operator's tests run over. To add a case, add a line.

Sizes are small and uneven on purpose: strides that do not divide, channels of 1 and 3, one pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import racecar_kernels as rk


@dataclass(frozen=True)
class Case:
    """A forward layer in modules; `build()` returns (pre, op, latent of the layer below, pre of the layer above)."""

    name: str
    shape: tuple[int, ...]
    build: Callable[[], tuple[list[nn.Module], nn.Module, list[nn.Module], list[nn.Module]]]


def _case(
    name: str,
    shape: tuple[int, ...],
    op: Callable[[], nn.Module],
    pre: Callable[[], list[nn.Module]] = list,
    latent: Callable[[], list[nn.Module]] = list,
    undo: Callable[[], list[nn.Module]] = list,
) -> Case:
    return Case(name, shape, lambda: (pre(), op(), latent(), undo()))


def _conv(c_in: int, c_out: int, kernel, dims: int = 2, **kwargs) -> Callable[[], nn.Module]:
    return lambda: {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](c_in, c_out, kernel, **kwargs)


def _max_pool(*args, dims: int = 2, **kwargs) -> Callable[[], list[nn.Module]]:
    return lambda: [{1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}[dims](*args, **kwargs)]


def _up(factor: int | tuple[int, ...]) -> Callable[[], list[nn.Module]]:
    return lambda: [nn.Upsample(scale_factor=factor)]


def _relu() -> list[nn.Module]:
    return [nn.ReLU()]


# Those that work here: an installation without the extension has one less.
BACKENDS = [
    name for name in rk.backends() if rk.why_not(name, rk.Query(rk.Layer(rk.Tied()), "cpu", torch.float32)) is None
]

CASES = [
    _case("linear", (5, 4), lambda: nn.Linear(4, 3), latent=lambda: [nn.Tanh()]),
    _case("linear on tokens, layer norm", (3, 5, 4), lambda: nn.Linear(4, 6), latent=lambda: [nn.LayerNorm(4)]),
    _case("linear without bias", (2, 3), lambda: nn.Linear(3, 2, bias=False), latent=lambda: [nn.GELU()]),
    _case("conv", (2, 3, 5, 6), _conv(3, 4, 3, padding=1), latent=_relu),
    _case("wide, few pixels", (2, 64, 4, 3), _conv(64, 65, 3, stride=2, padding=1), latent=_relu),
    _case("one pixel, one channel", (2, 1, 1, 1), _conv(1, 1, 3, padding=1), latent=lambda: [nn.Sigmoid()]),
    _case("strided, odd", (2, 3, 7, 8), _conv(3, 4, 3, stride=2, padding=1), latent=lambda: [nn.ELU()]),
    _case("stride beyond kernel", (2, 2, 9, 8), _conv(2, 3, 2, stride=3), latent=_relu),
    _case("dilated, grouped", (2, 4, 8, 7), _conv(4, 6, 3, padding=2, dilation=2, groups=2, bias=False)),
    _case("depthwise", (2, 3, 6, 6), _conv(3, 3, 3, padding=1, groups=3), latent=lambda: [nn.SiLU()]),
    _case("same, even kernel", (2, 2, 6, 5), _conv(2, 3, 4, padding="same"), latent=lambda: [nn.Softplus()]),
    _case("valid", (2, 2, 6, 5), _conv(2, 3, (2, 3), padding="valid")),
    _case("circular", (2, 2, 6, 5), _conv(2, 3, 3, padding=(2, 1), padding_mode="circular"), latent=_relu),
    _case("reflect", (2, 2, 6, 5), _conv(2, 3, 3, padding=(2, 1), padding_mode="reflect")),
    _case("replicate, strided", (2, 2, 7, 6), _conv(2, 3, 3, stride=2, padding=1, padding_mode="replicate")),
    _case("1d", (2, 3, 9), _conv(3, 4, 3, 1, padding=1), latent=lambda: [nn.Tanh()]),
    _case("1d, reflect", (2, 3, 9), _conv(3, 4, 3, 1, padding=1, padding_mode="reflect")),
    _case("3d", (2, 2, 4, 5, 3), _conv(2, 3, 3, 3, padding=1), latent=_relu),
    _case("3d, circular", (2, 2, 4, 5, 3), _conv(2, 3, 3, 3, padding=1, padding_mode="circular")),
    _case("batch norm, relu", (3, 3, 5, 6), _conv(3, 4, 3), latent=lambda: [nn.BatchNorm2d(3), nn.ReLU()]),
    _case("relu, batch norm", (3, 3, 5, 6), _conv(3, 4, 3), latent=lambda: [nn.ReLU(), nn.BatchNorm2d(3)]),
    _case("batch norm, eval", (3, 3, 5, 6), _conv(3, 4, 3), latent=lambda: [nn.BatchNorm2d(3).eval(), nn.ReLU()]),
    _case("batch norm without affine", (3, 3, 4, 4), _conv(3, 4, 3), latent=lambda: [nn.BatchNorm2d(3, affine=False)]),
    _case("batch norm of features", (6, 4), lambda: nn.Linear(4, 3), latent=lambda: [nn.BatchNorm1d(4), nn.Tanh()]),
    _case("group norm", (2, 4, 5, 6), _conv(4, 3, 3), latent=lambda: [nn.GroupNorm(2, 4), nn.ReLU()]),
    _case("instance norm", (2, 3, 5, 6), _conv(3, 4, 3), latent=lambda: [nn.InstanceNorm2d(3, affine=True)]),
    _case("instance norm, 1d", (2, 3, 7), _conv(3, 4, 3, 1), latent=lambda: [nn.InstanceNorm1d(3), nn.ReLU()]),
    _case("layer norm of images", (2, 3, 5, 6), _conv(3, 4, 3), latent=lambda: [nn.LayerNorm((3, 5, 6)), nn.ReLU()]),
    _case("prelu", (2, 3, 5, 6), _conv(3, 4, 3), latent=lambda: [nn.PReLU(3)]),
    _case("prelu, one slope, then norm", (2, 3, 5, 6), _conv(3, 4, 3), latent=lambda: [nn.PReLU(), nn.BatchNorm2d(3)]),
    _case("pooled", (2, 3, 8, 6), _conv(3, 4, 3, padding=1), _max_pool(2), _relu),
    _case("pooled, cut", (2, 3, 9, 7), _conv(3, 4, 3, padding=1), _max_pool(2, ceil_mode=True), _relu),
    _case("pooled, continued", (2, 3, 9, 7), _conv(3, 4, 3, padding=1), _max_pool(2), lambda: [nn.Tanh()]),
    _case("overlapping pool", (2, 3, 9, 8), _conv(3, 4, 3, padding=1), _max_pool(3, stride=2, padding=1)),
    _case("dilated pool", (2, 3, 9, 8), _conv(3, 4, 3, padding=1), _max_pool(2, stride=1, dilation=2)),
    _case("average pool", (2, 3, 8, 6), _conv(3, 4, 3, padding=1), lambda: [nn.AvgPool2d((2, 3))], _relu),
    _case("1d pool", (2, 3, 9), _conv(3, 4, 3, 1, padding=1), _max_pool(2, dims=1), _relu),
    _case("3d pool", (2, 2, 4, 6, 4), _conv(2, 3, 3, 3, padding=1), _max_pool(2, dims=3), _relu),
    _case("up-sampled", (2, 3, 4, 3), _conv(3, 4, 3, padding=1), _up(2), lambda: [nn.Tanh()]),
    _case("1d up-sampled", (2, 3, 5), _conv(3, 4, 3, 1, padding=1), _up(3)),
    _case("3d up-sampled", (2, 2, 2, 3, 2), _conv(2, 3, 3, 3, padding=1), _up((1, 2, 2))),
    _case("pool, dropout, up", (2, 3, 9, 8), _conv(3, 4, 3, padding=1),
          lambda: [nn.MaxPool2d(3, 2), nn.Dropout(0.5), nn.Upsample(scale_factor=2)], _relu),
    _case("source pooled", (2, 3, 8, 6), _conv(3, 4, 3, padding=1), latent=_relu, undo=_max_pool(2)),
    _case("source pooled by 3 and 2", (2, 3, 9, 8), _conv(3, 4, 5, padding=2), undo=_max_pool((3, 2))),
    _case("source pooled, odd", (2, 3, 9, 8), _conv(3, 4, 3, padding=1), undo=_max_pool(2)),
    _case("source pooled, same", (2, 3, 8, 6), _conv(3, 4, 4, padding="same"), undo=_max_pool(2)),
    _case("source pooled, strided", (2, 3, 15, 16), _conv(3, 4, 3, padding=1, stride=2), undo=_max_pool(2)),
    _case("source pooled, 1d", (2, 3, 8), _conv(3, 4, 3, 1, padding=1), undo=_max_pool(2, dims=1)),
    _case("source pooled, 3d", (2, 2, 4, 4, 4), _conv(2, 3, 3, 3, padding=1), undo=_max_pool(2, dims=3)),
    _case("source pooled, many pixels", (6, 12, 16, 16), _conv(12, 3, 3, padding=1), undo=_max_pool(2)),
    _case("source pooled, many pixels, few channels", (6, 2, 16, 16), _conv(2, 3, 3, padding=1), undo=_max_pool(2)),
    _case("source up-sampled", (2, 3, 4, 4), _conv(3, 4, 3, padding=1), undo=_up(2)),
]  # fmt: skip

# Sizes as they occur in training, for `make bench-ops`: layers of the networks in racecar.bench.networks.
REALISTIC = [
    _case("MNIST, layer 1", (64, 1, 28, 28), _conv(1, 64, 3, padding=1), undo=_max_pool(2)),
    _case("MNIST, layer 2", (64, 64, 28, 28), _conv(64, 64, 3, padding=1), _max_pool(2), _relu, _max_pool(2)),
    _case("CIFAR, layer 2", (16, 64, 32, 32), _conv(64, 64, 3, padding=1),
          latent=lambda: [nn.BatchNorm2d(64), nn.ReLU()], undo=_max_pool(2)),
    _case("CIFAR, layer 9", (16, 512, 4, 4), _conv(512, 512, 3, padding=1),
          latent=lambda: [nn.BatchNorm2d(512), nn.ReLU()]),
    _case("VGG19, layer 4", (1, 128, 112, 112), _conv(128, 128, 3, padding=1), latent=_relu, undo=_max_pool(2)),
    _case("weather, one of 38", (1, 128, 32, 64), _conv(128, 128, 3, padding=1, padding_mode="circular"),
          latent=lambda: [nn.LeakyReLU(0.3), nn.BatchNorm2d(128)]),
    _case("MLP, layer 1", (512, 12), lambda: nn.Linear(12, 10)),
    _case("MLP, layer 2", (512, 10), lambda: nn.Linear(10, 7), latent=lambda: [nn.Tanh()]),
    _case("transformer's linear", (8, 196, 384), lambda: nn.Linear(384, 384), latent=lambda: [nn.GELU()]),
]  # fmt: skip


@dataclass
class Sample:
    """A case with its tensors."""

    pre: list[nn.Module]
    op: nn.Module
    latent: list[nn.Module]
    undo: list[nn.Module]
    target: Tensor
    y: Tensor

    @property
    def settings(self) -> dict:
        """The keyword arguments of `reverse_layer` for this layer."""
        modules = dict(pre=self.pre, latent=self.latent, undo=self.undo)
        if isinstance(self.op, nn.Linear):
            return modules
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        return {**modules, **{name: getattr(self.op, name) for name in names}}

    @property
    def tensors(self) -> list[Tensor]:
        """y, target, and the parameters: of the operation, then of the latent."""
        return [self.y, self.target, *self.op.parameters(), *(p for m in self.latent for p in m.parameters())]


def make(
    case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, layout: torch.memory_format | None = None
) -> Sample:
    """Random tensors and parameters, away from the zeros and ones that hide mistakes."""
    torch.manual_seed(seed)
    pre, op, latent, undo = case.build()
    for module in (op, *latent):
        module.to(dtype)
        for p in module.parameters():
            if p.dim() == 1:
                nn.init.uniform_(p, 0.3, 1.2)
        for name, b in module.named_buffers():
            if name in ("running_mean", "running_var"):
                nn.init.uniform_(b, 0.2, 0.9)
    target = torch.randn(case.shape, dtype=dtype)
    y = op(nn.Sequential(*pre)(target)).detach()
    y = nn.Sequential(*undo)(torch.randn_like(y))
    if layout is not None:
        op.to(memory_format=layout)
        target, y = target.contiguous(memory_format=layout), y.contiguous(memory_format=layout)
    return Sample(pre, op, latent, undo, target.requires_grad_(), y.requires_grad_())
