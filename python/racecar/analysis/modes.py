"""What a layer looks at: its right singular vectors, as images beside those of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from racecar_kernels import describe

from .optional import optional
from .pictures import Row, as_images, draw_rows, grey_levels, signed_levels
from .recording import check_count, check_samples, evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST_MATRIX = 1024  # values per image; beyond it a full decomposition takes seconds to minutes
LARGEST_EXACT = 3 * 64 * 64  # beyond it neighbouring values lie so close that six digits take minutes, three seconds
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class Modes:
    """Patterns in input space, the strongest first.

    Attributes:
        images: float32, (patterns, ...) in the shape of an input; orthonormal, the largest entry of each positive.
        singular_values: float32, (patterns,), falling.
    """

    images: NDArray[np.float32]
    singular_values: NDArray[np.float32]

    def energy(self, x: Tensor) -> float:
        """Share of ‖x‖² that lies in the span of these patterns, 0 to 1; x: (samples, ...). 0 where x is all zeros."""
        flat, patterns = x.detach().cpu().double().flatten(1), torch.from_numpy(self.images).double().flatten(1)
        if flat.shape[1] != patterns.shape[1]:
            raise ValueError(f"patterns of shape {self.images.shape[1:]} do not fit x of shape {tuple(x.shape)}")
        whole = float(flat.square().sum())
        return float((flat @ patterns.T).square().sum()) / whole if whole else 0.0

    def plot(self, ax: Axes | None = None, *, image_shape: Sequence[int] | None = None) -> Figure:
        """Draws the patterns in a row, red positive and blue negative, each scaled to its largest entry.

        Args:
            ax: where to; None: a new figure.
            image_shape: (channels, height, width) of a pattern that is a vector.

        Returns:
            The figure drawn into.

        Raises:
            ValueError: the patterns are no images.
        """
        return draw_rows([Row("patterns", as_images(self.images, image_shape), signed_levels)], ax)


@dataclass(frozen=True, eq=False)
class SingularVectors:
    """A layer's right singular vectors beside those of the data, which are what the layer receives.

    Attributes:
        name: the layer's.
        samples: the first of the data, (samples, ...), as many as there are patterns.
        data, layer: the patterns.
        data_energy, layer_energy: share of the data's sum of squares in the span of each; no other patterns of this
            number hold more than the data's own.
    """

    name: str
    samples: NDArray[np.float32]
    data: Modes
    layer: Modes
    data_energy: float
    layer_energy: float

    def plot(self, ax: Axes | None = None, *, image_shape: Sequence[int] | None = None) -> Figure:
        """Draws three rows: samples, the data's patterns, the layer's. Red positive, blue negative.

        Args:
            ax: where to; None: a new figure.
            image_shape: (channels, height, width) of a sample, where the layer takes it as a vector.

        Returns:
            The figure drawn into.

        Raises:
            ValueError: the samples are no images.
        """
        rows = [Row("data", as_images(self.samples, image_shape), grey_levels)]
        for label, modes, energy in (
            ("of the data", self.data, self.data_energy),
            (f"of layer {self.name}", self.layer, self.layer_energy),
        ):
            rows.append(Row(label, as_images(modes.images, image_shape), signed_levels, (f"holds {energy:.0%}",)))
        return draw_rows(rows, ax)


@torch.no_grad()
def singular_vectors(
    model: nn.Module, x: Tensor, *, layer: str | None = None, count: int = 10, batch_size: int = 256
) -> SingularVectors:
    """Right singular vectors of a layer and of what it receives when x runs through the model.

    Any model will do, chain or not, wrapped or not: only the one layer is looked at.

    Args:
        model: evaluated, and left as it was.
        x: the model's input, (samples, ...).
        layer: name of a Linear or ConvNd in the model; None: the first that runs.
        count: how many patterns, the strongest first; at most one per value of a sample.
        batch_size: samples at a time.

    Raises:
        TypeError: `model` is no module, x no tensor.
        ValueError: no such layer, or it does not run; x is empty; values are not finite.
    """
    check_samples("singular_vectors", x)
    check_count("count", count)
    check_count("batch_size", batch_size)
    name, received = _received(model, x, layer, batch_size)
    data = data_modes(received, count)
    found = layer_modes(model.get_submodule(name), tuple(received.shape[1:]), count)
    return SingularVectors(
        name, received[: len(data.images)].numpy(), data, found, data.energy(received), found.energy(received)
    )


def _received(model: nn.Module, x: Tensor, layer: str | None, batch_size: int) -> tuple[str, Tensor]:
    """Name and input of a tied operation: float32 on the CPU, in the shape of x where it is x flattened."""
    seen: list[tuple[str, Tensor]] = []
    begun = 0

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if len(seen) < begun:  # the first that runs in this batch
                seen.append((name, args[0].detach().float().cpu()))

        return hook

    with evaluation(model):
        tied = {name: module for name, module in model.named_modules() if describe.is_a(module, describe.TIED)}
        if not tied:
            raise ValueError(f"{type(model).__name__} has no Linear or ConvNd to decompose")
        if layer is not None and layer not in tied:
            raise ValueError(f"no layer is named {layer!r}; those that can be decomposed are {', '.join(tied)}")
        watched = tied if layer is None else {layer: tied[layer]}
        hooks = [module.register_forward_pre_hook(watch(name)) for name, module in watched.items()]
        try:
            for batch in x.split(batch_size):
                begun += 1
                model(batch)
        finally:
            for handle in hooks:
                handle.remove()
    names = {name for name, _ in seen}
    if len(seen) < begun:
        raise ValueError(f"the model did not run {'any Linear or ConvNd' if layer is None else f'layer {layer!r}'}")
    if len(names) > 1:
        raise ValueError(f"{' and '.join(sorted(names))} ran first in different batches; name one of them with layer=")
    received = torch.cat([part for _, part in seen])
    flattened = received.dim() == 2 and received.numel() == x.numel()
    return names.pop(), received.reshape(x.shape) if flattened else received


def layer_modes(layer: nn.Module, shape: Sequence[int], count: int = 10) -> Modes:
    """Right singular vectors of a whole layer as a linear map A from its input to its output, bias left out.

    Not those of the flattened 3×3 kernels, which hold nine numbers each and cannot be set beside an image: A is the
    matrix of the convolution (or linear operation) on the full image, padding included. Its right singular vectors are
    the eigenvectors of AᵀA, which is what the layer's reverse applies to what the layer received; a direction that is
    to come back must have a singular value away from 0. The 2020 paper sets them beside the data for linear layers.

    Args:
        layer: a Linear, Conv1d, Conv2d or Conv3d.
        shape: of one input, without the batch: (channels, height, width). A Linear takes its input flattened where
            that fits, else along its last dimension.
        count: how many patterns, the strongest first; at most one per value.

    Raises:
        TypeError: the layer is none of these.
        ValueError: it does not take this shape, or its weight is not finite.
    """
    check_count("count", count)
    if not describe.is_a(layer, describe.TIED):
        raise TypeError(f"only a Linear or ConvNd can be decomposed, got {type(layer).__name__}")
    shape = tuple(shape)
    op: Any = layer
    weight = op.weight.detach().double().cpu()
    if not weight.isfinite().all():
        raise ValueError("the layer's weight is not finite, so it has no singular vectors")
    dims = describe.tied_of(layer).dims
    size = torch.Size(shape).numel()
    flattened = dims == 0 and size == op.in_features
    fits = (
        flattened or (shape and shape[-1] == op.in_features)
        if dims == 0
        else len(shape) == dims + 1 and shape[0] == op.in_channels
    )
    if not fits:
        raise ValueError(f"{layer} does not take inputs of shape {shape}")

    def features(images: Tensor) -> Tensor:
        if dims == 0:
            return F.linear(images.flatten(1) if flattened else images, weight)
        mode = "constant" if op.padding_mode == "zeros" else op.padding_mode
        inputs = F.pad(images, op._reversed_padding_repeated_twice, mode=mode)
        return _CONVOLUTIONS[dims](inputs, weight, None, op.stride, 0, op.dilation, op.groups)

    def gram(images: Tensor) -> Tensor:
        with torch.enable_grad():  # AᵀA: the adjoint of a linear map is its vjp
            return torch.func.vjp(features, images)[1](features(images))[0]

    return strongest(gram, shape, count)


def data_modes(x: Tensor, count: int = 10) -> Modes:
    """Right singular vectors of the data matrix, samples as rows, mean not removed: the span that holds most of ‖x‖².

    Args:
        x: (samples, ...).
        count: how many patterns; at most one per value of a sample.

    Raises:
        TypeError: x is no tensor.
        ValueError: x is empty or not finite.
    """
    check_samples("data_modes", x)
    check_count("count", count)
    flat = x.detach().flatten(1).double().cpu()
    if not flat.isfinite().all():
        raise ValueError("the data are not finite, so they have no singular vectors")

    def gram(images: Tensor) -> Tensor:
        return (images.flatten(1) @ flat.T @ flat).reshape(images.shape)

    return strongest(gram, tuple(x.shape[1:]), count)


def strongest(gram: Callable[[Tensor], Tensor], shape: tuple[int, ...], count: int) -> Modes:
    """The leading eigenvectors of AᵀA, given as a function of a batch of inputs, with the singular values of A."""
    size = torch.Size(shape).numel()
    if size <= LARGEST_MATRIX or count >= size:
        matrix = gram(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).reshape(size, size)
        values, vectors = torch.linalg.eigh(matrix)  # rising order
    else:
        values, vectors = lanczos(gram, shape, count)
    patterns = vectors.T.flip(0)[:count]
    largest = patterns.gather(1, patterns.abs().argmax(1, keepdim=True))
    images = (patterns * largest.sign()).float().reshape(-1, *shape)
    return Modes(images.numpy(), values.flip(0)[:count].clamp_min(0).sqrt().float().numpy())


def lanczos(gram: Callable[[Tensor], Tensor], shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, rising, and their eigenvectors as columns, without ever forming the matrix."""
    linalg = optional("scipy.sparse.linalg", f"decomposing inputs of more than {LARGEST_MATRIX} values")
    size = torch.Size(shape).numel()

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = gram(torch.from_numpy(vector.reshape(1, *shape))).flatten().numpy()
        return result

    operator = linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=size)  # a fixed start: the same picture every time
    tolerance = 1e-6 if size <= LARGEST_EXACT else 1e-3
    values, vectors = linalg.eigsh(operator, k=count, which="LA", v0=start, tol=tolerance)
    order = values.argsort()
    return torch.from_numpy(values[order]), torch.from_numpy(np.ascontiguousarray(vectors[:, order]))
