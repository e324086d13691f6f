"""What a first layer looks at: its right singular vectors, as images beside those of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST_MATRIX = 1024  # values per image; beyond it a full decomposition takes seconds to minutes
LARGEST_EXACT = 3 * 64 * 64  # beyond it neighbouring values lie so close that six digits take minutes, three seconds


@dataclass(frozen=True)
class Modes:
    """Patterns in input space, the strongest first.

    Attributes:
        images: float32, shape (patterns, channels, height, width), orthonormal, the largest entry of each positive.
        singular_values: shape (patterns,), falling.
    """

    images: Tensor
    singular_values: Tensor

    def energy(self, x: Tensor) -> float:
        """Share of ‖x‖² that lies in the span of these patterns, 0 to 1; x: (images, channels, height, width)."""
        flat, patterns = x.flatten(1), self.images.flatten(1)
        return float((flat @ patterns.T).square().sum() / flat.square().sum())


def first_layer_modes(network: nn.Sequential, image_shape: tuple[int, int, int], count: int = 10) -> Modes:
    """Right singular vectors of the whole first layer as a linear map A from images to features, bias left out.

    Not those of the flattened 3×3 kernels, which hold nine numbers each and cannot be set beside an image: A is the
    matrix of the convolution (or linear operation) on the full image, padding included. Its right singular vectors are
    the eigenvectors of AᵀA, which is what the first layer's reverse pass applies to an image; a direction that is to
    come back must have a singular value away from 0. The 2020 paper sets them beside the data for linear layers.

    Args:
        network: a chain whose first tied operation is a Linear or Conv2d.
        image_shape: (channels, height, width).
        count: how many patterns, the strongest first.

    Raises:
        ValueError: no such layer.
    """
    layer = next((module for module in network if isinstance(module, nn.Conv2d | nn.Linear)), None)
    if layer is None:
        raise ValueError(f"{type(network).__name__} has no Conv2d or Linear to decompose")
    weight = layer.weight.detach().double().cpu()

    def features(images: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(images.flatten(1), weight)
        inputs = F.pad(images, layer._reversed_padding_repeated_twice, mode=PADDING[layer.padding_mode])
        return F.conv2d(inputs, weight, None, layer.stride, 0, layer.dilation, layer.groups)

    def gram(images: Tensor) -> Tensor:
        return torch.func.vjp(features, images)[1](features(images))[0]  # AᵀA: the adjoint of a linear map is its vjp

    return strongest(gram, image_shape, count)


PADDING = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def data_modes(x: Tensor, count: int = 10) -> Modes:
    """Right singular vectors of the data matrix, images as rows, mean not removed: the span that holds most of ‖x‖².

    Args:
        x: images of shape (images, channels, height, width).
        count: how many patterns.
    """
    flat = x.flatten(1).double().cpu()
    channels, height, width = x.shape[1:]

    def gram(images: Tensor) -> Tensor:
        return (images.flatten(1) @ flat.T @ flat).reshape(images.shape)

    return strongest(gram, (channels, height, width), count)


def strongest(gram: Callable[[Tensor], Tensor], image_shape: tuple[int, int, int], count: int) -> Modes:
    """The leading eigenvectors of AᵀA, given as a function of a batch of images, with the singular values of A."""
    size = torch.Size(image_shape).numel()
    if size <= LARGEST_MATRIX:
        matrix = gram(torch.eye(size, dtype=torch.float64).reshape(size, *image_shape)).reshape(size, size)
        values, vectors = torch.linalg.eigh(matrix)  # rising order
    else:
        values, vectors = lanczos(gram, image_shape, count)
    patterns = vectors.T.flip(0)[:count]
    largest = patterns.gather(1, patterns.abs().argmax(1, keepdim=True))
    images = (patterns * largest.sign()).float().reshape(-1, *image_shape)
    return Modes(images, values.flip(0)[:count].clamp_min(0).sqrt().float())


def lanczos(gram: Callable[[Tensor], Tensor], image_shape: tuple[int, int, int], count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues, rising, and their eigenvectors as columns, without ever forming the matrix."""
    # scipy comes with scikit-learn.
    from scipy.sparse.linalg import LinearOperator, eigsh  # type: ignore[import-untyped]

    size = torch.Size(image_shape).numel()

    def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = gram(torch.from_numpy(vector.reshape(1, *image_shape))).flatten().numpy()
        return result

    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).normal(size=size)  # a fixed start: the same picture every time
    tolerance = 1e-6 if size <= LARGEST_EXACT else 1e-3
    values, vectors = eigsh(operator, k=count, which="LA", v0=start, tol=tolerance)
    order = values.argsort()
    return torch.from_numpy(values[order]), torch.from_numpy(np.ascontiguousarray(vectors[:, order]))
