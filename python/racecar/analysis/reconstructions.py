"""What comes back at the input when the reverse starts at any depth of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .pictures import Row, as_images, draw_rows, grey_levels
from .recording import check_count, check_samples, evaluated, states_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Reconstructions:
    """d'_1 by the depth at which the reverse starts: m means d_{m+1}, what layer m gives, run back through m layers.

    The error ‖d_1 − d'_1‖ / ‖d_1‖ is taken over all samples together. The gain g makes ‖d_1 − g·d'_1‖ smallest, since
    a plain network, which nothing taught the right scale, gives its input back at another one; 0 where nothing comes
    back. NaN where a value is not finite.

    Attributes:
        depths: the depths m, (depths,).
        names: of the layers whose outputs are run back.
        inputs: d_1 in the model's dtype, (samples, ...): the model's input, unless something prepares it for the first
            layer.
        images: d'_1, (depths, samples, ...), without the gain.
        gain, error, error_with_gain: by depth, float64, (depths,).
    """

    depths: tuple[int, ...]
    names: tuple[str, ...]
    inputs: NDArray[Any]
    images: NDArray[Any]
    gain: NDArray[np.float64]
    error: NDArray[np.float64]
    error_with_gain: NDArray[np.float64]

    def plot(self, ax: Axes | None = None, *, count: int = 10, image_shape: Sequence[int] | None = None) -> Figure:
        """Draws the first inputs, and below them what comes back from every depth, multiplied by its gain.

        Args:
            ax: where to; None: a new figure.
            count: how many samples.
            image_shape: (channels, height, width) of a sample, where the model takes it as a vector.

        Returns:
            The figure drawn into.

        Raises:
            ValueError: the samples are no images.
        """
        check_count("count", count)
        rows = [Row("input", as_images(self.inputs[:count], image_shape), grey_levels)]
        for i, name in enumerate(self.names):
            shown = as_images(self.images[i, :count] * self.gain[i], image_shape)
            rows.append(Row(f"from layer {name}", shown, grey_levels, (f"error {self.error_with_gain[i]:.2f}",)))
        return draw_rows(rows, ax)


@torch.no_grad()
def reconstructions(
    model: nn.Module, x: Tensor, *, depths: Sequence[int] | None = None, batch_size: int = 256
) -> Reconstructions:
    """Runs x forwards, and back to the input from what each of the layers gives.

    Args:
        model: with a unique path from output to input, as `racecar.wrap` finds it, wrapped or not; norms as in
            evaluation. It is left as it was.
        x: the model's input, (samples, ...).
        depths: where the reverse starts, 1 behind the first layer to n behind the last; None: all of them. The last is
            what `net.reconstruct(x)` gives in evaluation mode.
        batch_size: samples at a time.

    Returns:
        d'_1 from every depth, and how far it is from d_1.

    Raises:
        TypeError: x is no tensor, or a depth no whole number.
        ValueError: x is empty, the model has no unique path or no such depth.
    """
    check_samples("reconstructions", x)
    check_count("batch_size", batch_size)
    inputs: list[Tensor] = []
    with evaluated(model) as engine:
        names = engine.plan.names[: engine.plan.chain]
        chosen = _chosen(depths, len(names))
        back: list[list[Tensor]] = [[] for _ in chosen]
        for batch in x.split(batch_size):
            with engine.recording(reconstruct=True) as run:
                model(batch)
            states = states_of(engine, run)
            inputs.append(_shaped(states[0], batch))
            for own, depth in zip(back, chosen, strict=True):
                y = states[depth]
                for m in reversed(range(depth)):
                    y = engine.reverse_of(m, y, run)
                own.append(_shaped(y, batch))
    d, images = torch.cat(inputs), [torch.cat(own) for own in back]
    fits = np.array([fit(d, own) for own in images])
    return Reconstructions(
        tuple(chosen),
        tuple(names[depth - 1] for depth in chosen),
        d.numpy(),
        torch.stack(images).numpy(),
        *fits.T,
    )


def _chosen(depths: Sequence[int] | None, n: int) -> list[int]:
    if depths is None:
        return list(range(1, n + 1))
    chosen = [check_count("a depth", depth) for depth in depths]
    if not chosen or max(chosen) > n:
        raise ValueError(f"depths must be from 1 to {n}, behind the last layer of this model, got {chosen}")
    return chosen


def _shaped(d: Tensor, x: Tensor) -> Tensor:
    """d on the CPU, in the shape of the images where a flatten stands in front of the first layer."""
    own = d.reshape(x.shape) if d.numel() == x.numel() else d
    own = own.detach().cpu()
    return own if own.dtype in (torch.float32, torch.float64) else own.float()  # NumPy knows no bfloat16


def fit(d: Tensor, back: Tensor) -> tuple[float, float, float]:
    """The gain g that makes ‖d − g·back‖ smallest, ‖d − back‖ / ‖d‖, and the same with the gain."""
    d, back = d.double(), back.double()
    power, norm = float(back.square().sum()), float(d.norm())
    gain = float((d * back).sum()) / power if power != 0 else 0.0
    rest, scaled = float((d - back).norm()), float((d - gain * back).norm())
    if norm == 0:
        return gain, 0.0 if rest == 0 else float("inf"), 0.0
    return gain, rest / norm, scaled / norm
