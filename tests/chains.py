"""The one list of chains that run forwards and backwards together, for the tied chain's tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from racecar.plan import plan_chain
from racecar_kernels import describe
from racecar_kernels.layer import Layer


def _conv(c_in: int, c_out: int, kernel=3, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, **{"padding": 1, **kwargs})


CHAINS: dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    "one linear": ((5, 4), lambda: [nn.Linear(4, 3)]),
    "mlp": ((7, 6), lambda: [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 3, bias=False)]),
    "vector": ((6,), lambda: [nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3), nn.Tanh()]),
    "tokens": ((2, 5, 6), lambda: [nn.Linear(6, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3), nn.ReLU()]),
    "conv": ((3, 2, 8, 6), lambda: [_conv(2, 4), nn.ReLU(), _conv(4, 3), nn.Sigmoid()]),
    "pooled": ((3, 2, 8, 8), lambda: [_conv(2, 4), nn.ReLU(), nn.MaxPool2d(2), _conv(4, 5), nn.ReLU(),
                                      nn.MaxPool2d(2), _conv(5, 1), nn.ReLU()]),
    "pooled, odd": ((2, 2, 9, 7), lambda: [nn.MaxPool2d(2), _conv(2, 4), nn.Tanh(), nn.MaxPool2d(2, ceil_mode=True),
                                           _conv(4, 3), nn.ELU()]),
    "overlapping pool": ((2, 2, 9, 8), lambda: [_conv(2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), _conv(3, 2)]),
    "average pool": ((2, 2, 8, 6), lambda: [_conv(2, 3), nn.ReLU(), nn.AvgPool2d(2), _conv(3, 2), nn.LeakyReLU(0.2)]),
    "strided": ((2, 2, 9, 8), lambda: [_conv(2, 4, stride=2), nn.ReLU(), _conv(4, 3, kernel=4, padding="same")]),
    "grouped, dilated": ((2, 4, 9, 8), lambda: [_conv(4, 6, dilation=2, groups=2), nn.ReLU(), _conv(6, 4, bias=False)]),
    "wide, few pixels": ((2, 64, 4, 3), lambda: [_conv(64, 66, stride=2), nn.ReLU(), nn.Conv2d(66, 64, 3, 1, 2, 2),
                                                 nn.BatchNorm2d(64), nn.ReLU(), _conv(64, 64, padding="same")]),
    "circular": ((2, 2, 6, 5), lambda: [_conv(2, 3, padding_mode="circular"), nn.ReLU(),
                                        _conv(3, 2, padding_mode="reflect")]),
    "up-sampled": ((2, 2, 4, 3), lambda: [nn.Upsample(scale_factor=2), _conv(2, 3), nn.Tanh(),
                                          nn.Upsample(scale_factor=2), _conv(3, 2), nn.Tanh()]),
    "batch norm": ((3, 2, 8, 6), lambda: [_conv(2, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), _conv(4, 5),
                                          nn.BatchNorm2d(5), nn.ReLU()]),
    "norm behind activation": ((3, 2, 6, 6), lambda: [_conv(2, 4), nn.ReLU(), nn.BatchNorm2d(4, affine=False),
                                                      _conv(4, 3), nn.PReLU(3)]),
    "frozen norm": ((3, 2, 6, 6), lambda: [_conv(2, 4), nn.BatchNorm2d(4).eval(), nn.ReLU(), _conv(4, 3)]),
    "group norm": ((3, 2, 6, 6), lambda: [_conv(2, 4), nn.GroupNorm(2, 4), nn.ReLU(), _conv(4, 3), nn.PReLU()]),
    "1d": ((3, 2, 9), lambda: [nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 3)]),
    "3d": ((2, 2, 4, 6, 4), lambda: [nn.Conv3d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2),
                                     nn.Conv3d(3, 2, 3, padding=1), nn.Tanh()]),
}  # fmt: skip


@dataclass
class Sample:
    """A chain with its tensors, as modules and as `tied_chain` takes it."""

    modules: nn.Sequential
    x: Tensor
    layers: list[Layer]
    weights: list[Tensor]
    biases: list[Tensor | None]
    params: list[Tensor | None]
    last: list

    @property
    def arguments(self) -> tuple:
        return self.x, self.layers, self.weights, self.biases, self.params

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that has a gradient."""
        return [self.x, *self.modules.parameters()]


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, *, last: bool = False) -> Sample:
    """Random tensors and parameters; `last`: channels_last."""
    torch.manual_seed(seed)
    shape, build = CHAINS[name]
    modules = nn.Sequential(*build()).to(dtype)
    for p in modules.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.3, 1.2)
    x = torch.randn(shape, dtype=dtype)
    if last and len(shape) == 4:
        modules.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    return describe_chain(modules, x.requires_grad_())


def describe_chain(modules: nn.Sequential, x: Tensor) -> Sample:
    """The chain as values and tensors."""
    plan = plan_chain(modules)
    above = [list(layer.latent) for layer in plan.layers[1:]]
    end = plan.order.index(plan.layers[-1].op) + 1
    above.append(plan.order[end:])
    layers = []
    for m, layer in enumerate(plan.layers):
        tied = describe.tied_of(layer.op)
        below = [describe.latent_of(module) for module in layer.latent] if m else []
        layers.append(Layer(tied, describe.steps_of(layer.pre, tied.dims), tuple(below)))
    params = [t for own in above for module in own for t in describe.latent_tensors(module, describe.latent_of(module))]
    return Sample(
        modules,
        x,
        layers,
        [layer.op.weight for layer in plan.layers],
        [layer.op.bias for layer in plan.layers],
        params,
        [describe.latent_of(module) for module in above[-1]],
    )
