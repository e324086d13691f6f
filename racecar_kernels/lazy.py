"""What the pointwise family works on: tensors that are computed where they are read; and what it gives."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .layer import Tied

Window = tuple[int, int] | None
"""(kh, kw) of a max pooling without overlap and padding, H × W to h × w = H // kh × W // kw; None without pooling."""


class Convolved(NamedTuple):
    """W image + bias, a convolution: cheaper to compute where it is read than to keep, where the image is narrow."""

    image: Tensor
    weight: Tensor
    bias: Tensor | None
    tied: Tied


class Lazy(NamedTuple):
    """act(x · scale[c] + shift[c]), rounded to the type of x; c is dimension 1, in a matrix the last one.

    Attributes:
        scale, shift: one value per channel; neither: no affine.
        act, args: as in `activations.TABLE`.
        mean: what a gradient's sum Σ g·(x - mean[c]) takes off x; None is 0.
        done: x holds the result already, and the activation matters to gradients alone.
        convolved: what gives x, which then has a shape and a type alone (it is on the device `meta`).
    """

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "identity"
    args: tuple[Any, ...] = ()
    mean: Tensor | None = None
    done: bool = False
    convolved: Convolved | None = None

    @property
    def as_it_is(self) -> bool:
        """Whether x is the tensor that this stands for."""
        plain = self.act == "identity" and self.scale is None and self.shift is None
        return self.done or (plain and self.convolved is None)

    def part(self, at: int, size: int) -> Lazy:
        """The same for `size` samples from `at` on."""
        own = self.convolved
        own = None if own is None else own._replace(image=own.image.narrow(0, at, size))
        return self._replace(x=self.x.narrow(0, at, size), convolved=own)


class Gradient(NamedTuple):
    """A gradient g; Σ g per channel where wanted, Σ g·(x - mean) with an affine, Σ (d - undo(a))² where wanted.

    The sums are float32, or float64 for float64.
    """

    g: Tensor
    total: Tensor | None = None
    with_x: Tensor | None = None
    loss: Tensor | None = None


class BatchNorm(NamedTuple):
    """A batch's mean and 1/deviation per channel, and the affine that the norm is with them."""

    mean: Tensor
    rstd: Tensor
    scale: Tensor
    shift: Tensor


def made(t: Tensor | None) -> Tensor:
    """A tensor that was asked for."""
    if t is None:
        raise RuntimeError("a tensor that was asked for has not been made")
    return t
