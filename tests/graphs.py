"""Small models whose forward is no chain: one of every form that a graph has to be planned in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Basic(nn.Module):
    """A basic block (He et al. 2016), with the in-place operations of the usual implementation."""

    def __init__(self, c: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = stride == 1 and c == out
        self.down = None if same else nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.one, self.two = Basic(4, 4), Basic(4, 6, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(self.one(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(h, 1), 1))


class Preactivated(nn.Module):
    """Norm and activation in front of the convolution, whose residual is not in place (He et al. 2016b)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, 1, 1)
        self.bn1, self.conv1 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 5, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        y = self.conv1(F.relu(self.bn1(h)))
        return h + self.conv2(F.dropout(self.bn2(y).relu(), 0.0))


class Dense(nn.Module):
    """Every layer reads all earlier ones (Huang et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4 + 2 * i) for i in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(4 + 2 * i, 2, 3, 1, 1) for i in range(3)])
        self.pool, self.last = nn.AvgPool2d(2), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.last(self.pool(torch.cat(features, 1)))


class Excited(nn.Module):
    """Depthwise, squeeze and excitation, pointwise (Howard et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        )
        self.fc1, self.fc2, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        self.project = nn.Sequential(nn.Conv2d(8, 3, 1, bias=False), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.expand(x))
        scale = self.gate(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(h, 1)))))
        return self.project(h * scale)


class Permuted(nn.Module):
    """Layer norm over channels that lie last, linear layers, a learned scale, a residual (Liu et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 7, 1, 3, groups=4)
        self.norm, self.up, self.act, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
        self.gamma = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(self.act(self.up(h)))).permute(0, 3, 1, 2)


class Reused(nn.Module):
    """The same convolution three times, a branch that comes together again, an up-sampling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.side, self.up = nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(3, 3, 1), nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        h = F.max_pool2d(torch.tanh(self.conv(h)), 2)
        return torch.cat([torch.tanh(self.conv(self.up(h))), self.side(x)], 1)


class Attention(nn.Module):
    """A block of a transformer, with linear layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.norm2(x))))))


class Functional(nn.Module):
    """A plain chain, written as functions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(3, 4, 3, 1, 1),
            nn.Conv2d(4, 5, 3, 1, 1),
            nn.Conv2d(5, 2, 3, 2, 1),
        )
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        h = F.dropout(torch.tanh(self.conv2(h)), 0.0)
        return self.head(self.conv3(h).relu().flatten(1))


def images(n: int = 3, c: int = 3, size: int = 12) -> Tensor:
    return torch.randn(n, c, size, size, dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "residual": (Residual, images),
    "pre-activated": (Preactivated, images),
    "dense": (Dense, images),
    "excited": (Excited, images),
    "permuted": (Permuted, lambda: images(c=4)),
    "reused": (Reused, images),
    "attention": (Attention, lambda: torch.randn(2, 5, 8, dtype=torch.float64)),
    "functional": (Functional, images),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """The model in float64, and an input."""
    torch.manual_seed(0)
    model, x = MODELS[name]
    return model().double(), x()
