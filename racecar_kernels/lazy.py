"""What the pointwise family works on: tensors that are computed where they are read; and what it gives."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

Window = tuple[int, int] | None
"""(kh, kw) of a max pooling without overlap and padding, H × W to h × w = H // kh × W // kw; None without pooling."""


class Lazy(NamedTuple):
    """act(x · scale[c] + shift[c]), rounded to the type of x; c is dimension 1, in a matrix the last one.

    Attributes:
        scale, shift: one value per channel; neither: no affine.
        act, args: as in `activations.TABLE`.
        mean: what a gradient's sum Σ g·(x - mean[c]) takes off x; None is 0.
        done: x holds the result already, and the activation matters to gradients alone.
    """

    x: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "identity"
    args: tuple[Any, ...] = ()
    mean: Tensor | None = None
    done: bool = False

    @property
    def as_it_is(self) -> bool:
        """Whether x is the tensor that this stands for."""
        return self.done or (self.act == "identity" and self.scale is None and self.shift is None)

    def part(self, at: int, size: int) -> Lazy:
        """The same for `size` samples from `at` on."""
        return self._replace(x=self.x.narrow(0, at, size))


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
