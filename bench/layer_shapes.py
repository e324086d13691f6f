"""The reverse layers of the measured networks as shapes, each once, however many layers have it."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from torch import nn

from racecar.bench.least import shapes_of
from racecar.bench.networks import Network
from racecar.bench.plain import BATCH_NORMS, POOLS, layers_of
from racecar_kernels.layer import Tied

Pair = tuple[int, int]


class Shape(NamedTuple):
    """u = Wᵀ s of one reverse layer, s = y - b.

    Attributes:
        c_in, c_out: channels of u and of s.
        size: rows and columns of u.
        factor: by which s, smaller, stands for itself repeated (the pooling above is undone); None: as it is.
        window: of the layer's own pooling, which is undone before the residual is taken; None: none.
        epilogue: relu, or identity at the first layer: activation, residual and the next source belong to the pass;
            none: u alone is written, since a norm's statistics, or an up-sampling, stand in between.
    """

    batch: int
    c_in: int
    c_out: int
    size: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    groups: int
    factor: Pair | None
    window: Pair | None
    epilogue: str

    @property
    def tied(self) -> Tied:
        return Tied(self.stride, tuple((p, p) for p in self.padding), (1, 1), self.groups)

    @property
    def source_size(self) -> Pair:
        """Rows and columns of s."""
        rows, columns = self.tied.output_size(self.size, self.kernel)
        f = self.factor or (1, 1)
        return rows // f[0], columns // f[1]

    @property
    def received_size(self) -> Pair:
        """Rows and columns of d, with which a is compared."""
        w = self.window or (1, 1)
        return self.size[0] * w[0], self.size[1] * w[1]

    @property
    def flops(self) -> int:
        """Of each of the three passes, with up-sampling folded."""
        folded = [k + f - 1 for k, f in zip(self.kernel, self.factor or (1, 1), strict=True)]
        return 2 * self.batch * prod(self.source_size) * self.c_out * self.c_in // self.groups * prod(folded)

    @property
    def key(self) -> dict[str, Any]:
        """What a table of kernels is looked up by; `pixels`: of u, over the whole batch."""
        return {
            "kernel": list(self.kernel),
            "stride": list(self.stride),
            "factor": None if self.factor is None else list(self.factor),
            "c_in": self.c_in,
            "c_out": self.c_out,
            "groups": self.groups,
            "pixels": self.batch * prod(self.size),
            "batch": self.batch,
            "size": list(self.size),
            "window": None if self.window is None else list(self.window),
            "epilogue": self.epilogue,
        }


def shapes_in(network: Network, batch: int, *, tiny: bool = False) -> dict[Shape, list[int]]:
    """Every shape of the full and the local reverse pass, and the layers that have it, counted from 1."""
    net = network.model(narrow=tiny)
    if not isinstance(net, nn.Sequential):
        raise ValueError(f"the layers of a chain are measured; {network.title} is none")
    sizes, layers = shapes_of(net, network.inputs(batch, tiny=tiny)), layers_of(net)
    found: dict[Shape, list[int]] = {}
    for m, layer in enumerate(layers):
        op: Any = layer.op
        if not isinstance(op, nn.Conv2d):
            continue
        below = layers[m - 1].latent if m else []
        known = not any(isinstance(module, (*BATCH_NORMS, nn.Upsample)) for module in (*below, *layer.pre))
        whole = Shape(
            batch, op.in_channels, op.out_channels, sizes[op][0][2:], op.kernel_size, op.stride, op.padding,
            op.groups, None, _window(layer.pre), ("relu" if m else "identity") if known else "none",
        )  # fmt: skip
        above = _window(layers[m + 1].pre) if m + 1 < len(layers) else None
        for shape in dict.fromkeys((whole._replace(factor=above), whole)):
            found.setdefault(shape, []).append(m + 1)
    return found


def _window(pre: list[nn.Module]) -> Pair | None:
    pools: list[Any] = [module for module in pre if isinstance(module, POOLS)]
    if not pools:
        return None
    k = pools[0].kernel_size
    return (k, k) if isinstance(k, int) else tuple(k)
