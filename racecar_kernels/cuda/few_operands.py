"""What the kernels between few and many channels are asked: which operands they serve, and how they are handed them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..fused import Incoming
from ..layer import Ints, Tied
from ..lazy import Lazy, Window
from ..pointwise import numbered
from ..transposed import can_fold
from . import tiles
from .parameters import FewParams, Operand, Source

MOST = 4  # few channels
NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NARROW, WIDE, WEIGHT = range(3)
MOST_ELEMENTS = 2**31 - 2**16  # of an image, and pixels of all: places within them have 32 bits
DEVICES = ["cuda"]  # a test adds the CPU, with a launcher of its own


# ------------------------------------------------------------------------------------------- what is served


def why_not(
    y: Lazy | Tensor,
    weight: Tensor,
    tied: Tied,
    shape: Ints,
    *,
    factor: Ints | None = None,
    d: Lazy | Tensor | None = None,
    window: Window = None,
    a: Lazy | None = None,
) -> str | None:
    """None where the kernels serve this layer, forward and backward, else a sentence that says why not.

    shape: of u. d: what a is compared with, at `window` times the size of u. a: the latent, or u and its activation.
    """
    lazies = [v if isinstance(v, Lazy) else Lazy(v) for v in (y, d, a) if v is not None]
    reason = why_not_layer(weight, tied) or _why_not_tensors(lazies, weight)
    reason = reason or _why_not_operation(lazies[0].x, weight, tied, shape, factor)
    if reason is None and d is not None:
        size, (kh, kw) = lazies[1].x.shape, window or (1, 1)
        if (size[2] // kh, size[3] // kw) != tuple(shape[2:]):
            reason = f"d has {tuple(size[2:])} pixels, which pooling by {window} does not turn into {tuple(shape[2:])}"
    return reason


def why_not_gradients(
    incoming: Incoming, others: list[Lazy], weight: Tensor, tied: Tied, given: Ints, factor: Ints | None = None
) -> str | None:
    """None where the gradients from g_u, with `others` read beside it, are served; given: the shape of y."""
    if incoming.a is not None and incoming.a.shift is not None:
        return "a norm's own gradients are sums over g_u, which the pointwise kernel computes"
    shape = incoming.like.shape
    parts = [v for v in (incoming.a, incoming.d, None if incoming.g is None else Lazy(incoming.g)) if v is not None]
    wrong = next((tuple(v.x.shape) for v in parts if v.x.shape != shape), None)
    if wrong is not None:
        return f"g, a and d need the size of u, got {tuple(shape)} and {wrong}"
    reason = why_not_layer(weight, tied) or _why_not_tensors([*parts, *others], weight)
    return reason or _why_not_operation(None, weight, tied, tuple(shape), factor, given)


def why_not_device(kind: str, index: int | None = None) -> str | None:
    """None where the kernels run on a device of this kind ("cuda", "cpu", ...), else a sentence.

    index: of the GPU; None: the current one.
    """
    if kind not in DEVICES:
        return f"the CUDA kernels need an NVIDIA GPU, got tensors on {kind}"
    return extension.why_not_on(index) if kind == "cuda" else None


def why_not_layer(weight: Tensor, tied: Tied) -> str | None:
    """The same of a layer, before the sizes of its images are known."""
    if tied.dims != 2 or tied.groups != 1 or tied.padding_mode != "zeros":
        return f"two-dimensional convolutions of one group with zero padding are served, got {tied}"
    if min(weight.shape[:2]) > MOST:
        return f"1 to {MOST} channels on one side are served, the weight has {weight.shape[0]} and {weight.shape[1]}"
    if weight.dtype not in NUMBERS:
        return f"one type of {_listed(NUMBERS)} is needed, got {weight.dtype}"
    return why_not_device(weight.device.type, weight.device.index)


def _why_not_tensors(lazies: list[Lazy], weight: Tensor) -> str | None:
    tensors = [*(v.x for v in lazies), weight]
    if any(t.device != weight.device for t in tensors):
        return f"the CUDA kernels need one NVIDIA GPU, got tensors on {_listed(t.device for t in tensors)}"
    if any(t.dtype != weight.dtype for t in tensors):
        return f"one type of {_listed(NUMBERS)} is needed, got {_listed(t.dtype for t in tensors)}"
    for v in lazies:
        if v.x.dim() != 4 or not _is_dense(v.x):
            return f"the tensors are not channels_last: strides {v.x.stride()} for sizes {tuple(v.x.shape)}"
        if numbered(v.act, v.args) is None or v.convolved is not None:
            return f"not served: {v.act}{v.args or ''} is not computed from its output"
    return None


def _why_not_operation(
    y: Tensor | None, weight: Tensor, tied: Tied, shape: Ints, factor: Ints | None, given: Ints = ()
) -> str | None:
    given = tuple(given if y is None else y.shape)
    if factor is not None and not can_fold(tied):
        return f"repetition is folded into a stride of 1, got {factor} and {tied.stride}"
    if 0 in (*shape, *given, *weight.shape):
        return f"there is nothing to compute: sizes {tuple(shape)} and {given}"
    whole = tuple(n * f for n, f in zip(given[2:], factor or (1, 1), strict=True))
    if (shape[0], *tied.output_size(shape[2:], tuple(weight.shape[2:]))) != (given[0], *whole):
        return f"{shape[0]} images of {tuple(shape[2:])} do not become {given[0]} of {whole}, which y stands for"
    if tuple(weight.shape[:2]) != (given[1], shape[1]):
        return f"the weight has sizes {tuple(weight.shape)}, y {given[1]} channels, u {shape[1]}"
    if max(prod(shape[1:]), prod(given[1:]), weight.numel(), shape[0] * prod(shape[2:])) > MOST_ELEMENTS:
        return f"images and the number of pixels are served up to {MOST_ELEMENTS}, got {tuple(shape)}"
    own = Operation.of(weight, tied, shape, given, factor, folded=False)
    if None in (tiles.narrow(own.towards(few=True)), tiles.wide(own.towards()), tiles.weight(own.towards())):
        return f"a kernel of {own.kernel} with dilation {tied.dilation} does not fit into shared memory"
    return None


def _listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _is_dense(t: Tensor) -> bool:
    """Whether the pixels of every image lie beside each other, channels innermost; images may lie apart."""
    _, c, h, w = t.shape
    wanted = ((c, 1), (h, w * c), (w, c))
    return all(n == 1 or stride == own for (n, own), stride in zip(wanted, t.stride()[1:], strict=True))


# ------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Operation:
    """Sizes of a convolution with few channels on one side; few_is_large: on that of u. A factor is its stride."""

    few_is_large: bool
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    large: tuple[int, int]
    small: tuple[int, int]
    images: int
    few: int
    channels: int
    itemsize: int

    @staticmethod
    def of(weight: Tensor, tied: Tied, shape: Ints, given: Ints, factor: Ints | None, *, folded: bool) -> Operation:
        """folded: whether the weight is, by the factor."""
        few_is_large = weight.shape[1] <= MOST
        grown = (0, 0) if factor is None or folded else tuple(f - 1 for f in factor)
        return Operation(
            few_is_large,
            (weight.shape[2] + grown[0], weight.shape[3] + grown[1]),
            _two(tied.stride if factor is None else factor),
            (tied.padding[0][0], tied.padding[1][0]),
            _two(tied.dilation),
            _two(shape[2:]),
            _two(given[2:]),
            shape[0],
            weight.shape[1 if few_is_large else 0],
            weight.shape[0 if few_is_large else 1],
            weight.element_size(),
        )

    def towards(self, few: bool = False) -> tiles.Geometry:
        """The geometry of a result with the few channels, or with the many."""
        large = self.few_is_large == few
        return tiles.Geometry(
            self.large if large else self.small,
            large, self.kernel, self.stride, self.dilation, self.few, self.channels, self.itemsize,
        )  # fmt: skip


def _two(values: Ints) -> tuple[int, int]:
    return values[0], values[1]


def launch(kernel: int, few: int, params: FewParams, like: Tensor) -> None:
    """On the current stream of like's device."""
    module = extension.load(extension.CUDA)
    if module is None:
        raise RuntimeError(f"the CUDA kernels are not there: {extension.why_not(extension.CUDA)}")
    module.few_channels(kernel, few, bytes(params), like)


def folding(like: Tensor) -> Any:
    """`fold` and `fold_adjoint` of the compiled module for a weight on a GPU; None: PyTorch folds it."""
    return extension.load(extension.CUDA) if like.is_cuda else None


class Launch:
    """Parameters for one kernel, and the tensors that have to live until it is launched."""

    def __init__(self, own: Operation, weight: Tensor, cut: tiles.Cut, result: tiles.Geometry):
        self.held: list[Tensor] = [weight]
        self.many: list[int] = []  # places and strides that decide about 16 bytes at once
        self.own, self.weight = own, weight
        p = self.params = FewParams()
        order = (0, 1, 2, 3) if own.few_is_large else (1, 0, 2, 3)
        p.weight, p.weight_stride = weight.data_ptr(), tuple(weight.stride(i) for i in order)
        sides = (own.small, own.large) if own.few_is_large else (own.large, own.small)
        p.many_size, p.few_size = sides
        p.images, p.channels, p.few_is_large = own.images, own.channels, own.few_is_large
        p.kernel, p.stride, p.padding, p.dilation = own.kernel, own.stride, own.padding, own.dilation
        p.tile, p.rect, p.lanes, p.tiles = cut.tile, cut.rect, cut.lanes, result.tiles(cut.tile)

    def hold(self, t: Tensor | None, *, wide: bool = False) -> int | None:
        """Its address; wide: of float32, dense."""
        if t is None:
            return None
        t = t.detach().float().contiguous() if wide else t
        self.held.append(t)
        return t.data_ptr()

    def image(self, t: Tensor | None, *, many: bool) -> tuple[int | None, int]:
        if t is None:
            return None, 0
        if many:
            self.many += [t.data_ptr(), t.stride(0) * t.element_size() if t.shape[0] > 1 else 0]
        return self.hold(t), t.stride(0)

    def fill(self, to: Source, lazy: Lazy, *, many: bool) -> None:
        to.x, to.batch = self.image(lazy.x, many=many)
        to.scale, to.shift = self.hold(lazy.scale, wide=True), self.hold(lazy.shift, wide=True)
        to.act, to.p = activation(lazy.act, lazy.args, lazy.x.dtype)
        to.done = lazy.done or lazy.as_it_is

    def read(self, to: Operand, what: Incoming | Lazy, *, many: bool, minus: Tensor | None = None) -> None:
        if isinstance(what, Lazy):
            self.fill(to.x, what, many=many)
            to.minus = self.hold(minus, wide=True)
            return
        to.incoming = 1
        to.g, to.g_batch = self.image(what.g, many=many)
        if what.a is not None:
            self.fill(to.x, what.a, many=many)
            if what.d is not None and what.c2 is not None:
                self.fill(to.d, what.d, many=many)
                to.c2 = self.hold(what.c2, wide=True)

    def run(self, kernel: int) -> None:
        own = self.own
        self.params.wide = own.channels * own.itemsize % 16 == 0 and all(n % 16 == 0 for n in self.many)
        launch(kernel, own.few, self.params, self.weight)


@lru_cache(maxsize=1024)
def activation(act: str, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[int, tuple[float, ...]]:
    """Number and parameters; a clamp's bounds as results are stored, which the derivative compares with them."""
    number, p = numbered(act, args) or (0, (0.0, 0.0, 0.0))
    if number == 1:
        p = tuple(float(torch.tensor(bound, dtype=dtype)) for bound in p)
    return number, p
