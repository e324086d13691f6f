"""The mutual-information plane: what every layer tells about the input and about the label, over training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from .pictures import axes_for, figure_of
from .recording import check_count, check_samples, evaluated, evaluation, states_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Limits = tuple[float, float]

_BOUNDED: dict[type[nn.Module], Limits] = {
    nn.Tanh: (-1, 1),
    nn.Softsign: (-1, 1),
    nn.Sigmoid: (0, 1),
    nn.Hardsigmoid: (0, 1),
    nn.Softmax: (0, 1),
    nn.ReLU6: (0, 6),
}
_MARKERS = "osD^v<>ph*PX"


@dataclass(frozen=True, eq=False)
class InformationPlane:
    """I(X; D) and I(D; Y) of every layer at every recorded epoch, in bits.

    Attributes:
        names: of the layers, the input first.
        epochs: float64, (epochs,), rising.
        about_x: I(X; D), float64, (epochs, layers): from 0 to the entropy of X, which is log₂ of the number of samples.
        about_y: I(D; Y), float64, (epochs, layers): from 0 to the entropy of the labels.
    """

    names: tuple[str, ...]
    epochs: NDArray[np.float64]
    about_x: NDArray[np.float64]
    about_y: NDArray[np.float64]

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draws I(D; Y) over I(X; D): a marker for every layer, a colour for every epoch; a line joins an epoch's.

        Args:
            ax: where to; None: a new figure.

        Returns:
            The figure drawn into.
        """
        ax = axes_for(ax, (6.4, 4.4))
        for x, y in zip(self.about_x, self.about_y, strict=True):
            ax.plot(x, y, color="grey", linewidth=0.6, alpha=0.4, zorder=1)
        span = {"vmin": self.epochs[0], "vmax": self.epochs[-1]}
        for i, name in enumerate(self.names):
            marker = _MARKERS[i % len(_MARKERS)]
            ax.scatter([], [], color="grey", marker=marker, label=name)
            shades = ax.scatter(self.about_x[:, i], self.about_y[:, i], c=self.epochs, marker=marker, **span)
        ax.legend(fontsize="small", title="layer")
        ax.set_xlabel("I(X; D), bits")
        ax.set_ylabel("I(D; Y), bits")
        if len(self.epochs) > 1:
            ax.figure.colorbar(shades, ax=ax, label="epoch")
        return figure_of(ax)


class MutualInformationPlane:
    """Records the mutual-information plane (Shwartz-Ziv & Tishby 2017) at the epochs that the user chooses.

        plane = MutualInformationPlane(patterns, labels)
        for epoch in range(epochs):
            train_one_epoch(net)
            plane.record(net, epoch)
        plane.result.plot()

    X is the index of the sample, all of them equally likely; D is what a layer gives, with every unit's value put
    into one of `bins` equal intervals. D then follows from X, so that I(X; D) = H(D), and I(D; Y) = H(D) − H(D | Y).

    The estimate cannot exceed log₂ of the number of samples. A layer of many units or unbounded values tells all
    samples apart, whatever it has learned, and then sits at that bound: the picture says something where the layers
    are narrow and the samples many, as in the study of 4096 patterns of 12 bits that it comes from.

    Args:
        x: the samples, as the model takes them: (samples, ...).
        y: whole numbers, one label per sample: (samples,).
        layers: names of modules of the model, which may be any; D is what each gives. None: the model has a unique
            path, as `racecar.wrap` finds it; D1, D2, ... are what its layers receive, the last what the last one gives.
        bins: how many intervals; 30 in the study.
        limits: name of a layer -> (lowest, highest) value, between which the intervals lie. Without them: the bounds of
            the activation that made D (tanh: −1 to 1), or else the range of all values of the layer in that recording.
        batch_size: samples at a time. The values of all samples are held together, for one recording.

    Raises:
        TypeError: x is no tensor; the labels or bins are no whole numbers.
        ValueError: x is empty, labels and samples differ in number, fewer than 2 bins, limits that do not rise.
    """

    def __init__(
        self,
        x: Tensor,
        y: ArrayLike | Tensor,
        *,
        layers: Sequence[str] | None = None,
        bins: int = 30,
        limits: Mapping[str, Limits] | None = None,
        batch_size: int = 4096,
    ) -> None:
        check_samples("MutualInformationPlane", x)
        if isinstance(layers, str) or (layers is not None and not layers):
            raise ValueError(f"layers must be a list of names of modules, or None, got {layers!r}")
        self.x, self.y = x, _labels(y, len(x))
        self.layers = None if layers is None else list(layers)
        self.bins, self.batch_size = check_count("bins", bins, 2), check_count("batch_size", batch_size)
        self.limits = {name: _checked(name, own) for name, own in (limits or {}).items()}
        self._epochs: list[float] = []
        self._names: tuple[str, ...] = ()
        self._found: list[list[tuple[float, float]]] = []

    def record(self, model: nn.Module, epoch: float) -> None:
        """Runs all samples through the model in evaluation mode, and adds a row to the plane.

        Args:
            model: wrapped or plain; it is left as it was.
            epoch: when this is, in any unit; larger than at the last recording.

        Raises:
            TypeError: the model is no module; one of `layers` does not give one tensor.
            ValueError: the epoch does not rise; values are not finite, or outside their limits; the model has other
                layers than at the last recording, not those asked for, or, without `layers`, has no unique path.
        """
        if not math.isfinite(epoch) or (self._epochs and epoch <= self._epochs[-1]):
            last = f"larger than {self._epochs[-1]:g}, the last one recorded" if self._epochs else "finite"
            raise ValueError(f"the epoch must be a number, {last}, got {epoch}")
        values = self._chain_values(model) if self.layers is None else self._module_values(model, self.layers)
        names = tuple(values)
        if self._names and names != self._names:
            raise ValueError(
                f"the recordings so far are of {', '.join(self._names)}, this model gives {', '.join(names)}"
            )
        unknown = [name for name in self.limits if name not in values]
        if unknown:
            raise ValueError(f"limits name {', '.join(map(repr, unknown))}; the layers are {', '.join(names)}")
        row = []
        for name, (own, bounds) in values.items():
            try:
                row.append(binned_information(own, self.y, self.bins, self.limits.get(name, bounds)))
            except ValueError as error:
                raise ValueError(f"layer {name!r} at epoch {epoch:g}: {error}") from None
        self._names = names
        self._epochs.append(float(epoch))
        self._found.append(row)

    @property
    def result(self) -> InformationPlane:
        """What was recorded so far. Raises RuntimeError if nothing was."""
        if not self._epochs:
            raise RuntimeError("nothing was recorded yet; call record(model, epoch) first")
        found = np.array(self._found, dtype=np.float64)
        return InformationPlane(self._names, np.array(self._epochs), found[..., 0], found[..., 1])

    def plot(self, ax: Axes | None = None) -> Figure:
        """`result.plot(ax)`."""
        return self.result.plot(ax)

    @torch.no_grad()
    def _chain_values(self, model: nn.Module) -> dict[str, tuple[NDArray[Any], Limits | None]]:
        """D1 .. D{n+1} of all samples, and their bounds."""
        with evaluated(model) as engine:
            batches = []
            for batch in self.x.split(self.batch_size):
                with engine.recording(reconstruct=True) as run:
                    model(batch)
                batches.append([_array(state) for state in states_of(engine, run)])
            plan = engine.plan
            made_by = [None, *(layer.latent[-1] if layer.latent else None for layer in plan.layers[1 : plan.chain])]
            # what made the output of a model's own forward no plan says: it is then binned over its range
            made_by.append(plan.order[plan.layers[-1].y] if plan.order else None)
        return {
            f"D{m}": (np.concatenate(parts), _bounds(module))
            for m, (parts, module) in enumerate(zip(zip(*batches, strict=True), made_by, strict=True), 1)
        }

    @torch.no_grad()
    def _module_values(self, model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[NDArray[Any], Limits | None]]:
        """What the named modules give for all samples, and their bounds."""
        found: dict[str, list[NDArray[Any]]] = {name: [] for name in layers}

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if not isinstance(output, Tensor):
                    raise TypeError(f"layer {name!r} gives a {type(output).__name__}, not one tensor")
                found[name].append(_array(output))

            return hook

        with evaluation(model):
            modules = dict(model.named_modules())
            unknown = [name for name in layers if name not in modules]
            if unknown:
                raise ValueError(f"{type(model).__name__} has no modules named {', '.join(map(repr, unknown))}")
            hooks = [modules[name].register_forward_hook(keep(name)) for name in found]
            batches = self.x.split(self.batch_size)
            try:
                for batch in batches:
                    model(batch)
            finally:
                for handle in hooks:
                    handle.remove()
        for name, parts in found.items():
            if len(parts) != len(batches) or sum(map(len, parts)) != len(self.x):
                raise ValueError(
                    f"layer {name!r} did not give one value per sample, once in a forward: it ran {len(parts)} times "
                    f"in {len(batches)} batches, and gave {sum(map(len, parts))} rows for {len(self.x)} samples"
                )
        return {name: (np.concatenate(parts), _bounds(modules[name])) for name, parts in found.items()}


def binned_information(
    values: ArrayLike, y: ArrayLike | Tensor, bins: int = 30, limits: Limits | None = None
) -> tuple[float, float]:
    """I(X; T) and I(T; Y) in bits, where X is the index of a sample and T its values put into bins.

    With n samples, equally likely, of which n_t fall together into the same bins: I(X; T) = H(T) = −Σ p_t log₂ p_t with
    p_t = n_t / n, since T follows from X; I(T; Y) = H(T) + H(Y) − H(T, Y).

    Args:
        values: (samples, ...).
        y: whole numbers, one label per sample: (samples,).
        bins: how many equal intervals; the last one has both of its ends.
        limits: (lowest, highest) value, between which they lie. None: those of `values`, all units together.

    Raises:
        TypeError: the labels or `bins` are no whole numbers.
        ValueError: there are no values, they are not finite or outside the limits; labels and samples differ in number;
            fewer than 2 bins; limits that do not rise.
    """
    check_count("bins", bins, 2)
    own = np.asarray(values)
    if own.ndim == 0 or not own.size:
        raise ValueError(f"there are no values, got an array of shape {own.shape}")
    own = own.reshape(len(own), -1)
    labels = _labels(y, len(own))
    if not np.isfinite(own).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(own))} of {own.size} values are not finite")
    seen = float(own.min()), float(own.max())
    low, high = seen if limits is None else _checked("values", limits)
    if seen[0] < low or seen[1] > high:
        raise ValueError(f"the values lie from {seen[0]:g} to {seen[1]:g}, outside the limits {low:g} and {high:g}")
    t = _codes(_binned(own, low, high, bins))
    joint = t * (int(labels.max()) + 1) + labels
    about_x, of_y, of_both = _entropy(t), _entropy(labels), _entropy(joint)
    return about_x, max(0.0, about_x + of_y - of_both)


def _binned(values: NDArray[Any], low: float, high: float, bins: int) -> NDArray[Any]:
    """The number of every value's interval, in as few bytes as hold it."""
    kind = np.min_scalar_type(bins - 1)
    if high == low:
        return np.zeros(values.shape, kind)
    place = np.floor((values.astype(np.float64) - low) * (bins / (high - low)))
    return np.minimum(place, bins - 1).astype(kind)


def _codes(rows: NDArray[Any]) -> NDArray[np.int64]:
    """A number for every row, the same for equal rows."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))
    return np.unique(whole.reshape(-1), return_inverse=True)[1].reshape(-1).astype(np.int64)


def _entropy(codes: NDArray[np.int64]) -> float:
    """H = log₂ n − Σ n_t log₂ n_t / n, in bits."""
    counts = np.unique(codes, return_counts=True)[1].astype(np.float64)
    return float(math.log2(len(codes)) - (counts * np.log2(counts)).sum() / len(codes))


def _labels(y: object, samples: int) -> NDArray[np.int64]:
    """Labels as 0, 1, ... in a row."""
    if y is None:
        raise TypeError("labels are needed, one whole number per sample, got None")
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.dtype.kind not in "iub":
        raise TypeError(f"labels must be whole numbers, got {labels.dtype}")
    if labels.shape != (samples,):
        raise ValueError(f"labels must be one per sample, of shape ({samples},), got {labels.shape}")
    return np.unique(labels, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _checked(name: str, limits: Limits) -> Limits:
    low, high = map(float, limits)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"limits of {name!r} must be two finite numbers, the lower first, got {tuple(limits)}")
    return low, high


def _bounds(module: nn.Module | None) -> Limits | None:
    """Between which values the outputs of a module lie; None: nothing bounds them."""
    if type(module) is nn.Hardtanh:
        return float(module.min_val), float(module.max_val)
    return None if module is None else _BOUNDED.get(type(module))


def _array(values: Tensor) -> NDArray[Any]:
    """A copy, in float32 or wider; the network may go on to change its own in place."""
    own = values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32), copy=True)
    array: NDArray[Any] = own.numpy()
    return array
