"""Motion blur: what a camera records when it moves along a line while the shutter is open."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_DENSE_KERNEL = 31  # PyTorch's convolution of one channel takes 46 s for a 193×193 kernel on 512×512 pixels


def motion_kernel(length: float, angle: float = 0.0) -> Tensor:
    """Kernel of a straight motion: a line of the given length, drawn through the centre.

    The weight of a pixel is the length of the line inside it; a horizontal line of odd length has 1/length in each.

    Args:
        length: distance moved, in pixels, at least 1 (1 leaves the image as it is).
        angle: direction in degrees, counter-clockwise from horizontal.

    Returns:
        Float32 kernel, square, of odd size, summing to 1.

    Raises:
        ValueError: length below 1, or length or angle not finite.
    """
    if not (math.isfinite(length) and length >= 1):
        raise ValueError(f"blur length must be a number of pixels, at least 1, got {length}")
    if not math.isfinite(angle):
        raise ValueError(f"blur angle must be a number of degrees, got {angle}")
    radius = math.ceil((length - 1) / 2)
    samples = 256 * math.ceil(length)
    # Midpoints of equal pieces: none lies on the border between two pixels of a horizontal line.
    along = ((torch.arange(samples, dtype=torch.float64) + 0.5) / samples - 0.5) * length
    column = (along * math.cos(math.radians(angle))).round().long() + radius
    row = (-along * math.sin(math.radians(angle))).round().long() + radius  # rows grow downwards
    size = 2 * radius + 1
    kernel = torch.zeros(size * size, dtype=torch.float64)
    kernel = kernel.index_add(0, row * size + column, torch.ones(samples, dtype=torch.float64)).reshape(size, size)
    return (kernel / kernel.sum()).float()


def motion_blur(images: Tensor, length: float, angle: float = 0.0) -> Tensor:
    """Convolves every channel of every image with `motion_kernel(length, angle)`.

    The corruption of the n-MNIST motion-blur set (Basu et al. 2017, "Learning Sparse Feature Representations using
    Probabilistic Quadtrees and Deep Belief Nets"), with length and direction free. Outside the image is taken to be 0.

    Args:
        images: floating point, shape (images, channels, height, width).
        length: distance moved, in pixels, at least 1.
        angle: direction in degrees, counter-clockwise from horizontal.

    Returns:
        Blurred images of the same shape and dtype; the range [0, 1] is kept.

    Raises:
        ValueError: images of another rank or not floating point; see `motion_kernel` for the rest.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point of shape (images, channels, height, width), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    kernel = motion_kernel(length, angle).to(images)
    if kernel.shape[-1] > LARGEST_DENSE_KERNEL:
        return shift_and_add(images, kernel)
    n, channels, height, width = images.shape
    flat = images.reshape(n * channels, 1, height, width)
    # The kernel is symmetric about its centre, so this cross-correlation is the convolution.
    return F.conv2d(flat, kernel[None, None], padding=kernel.shape[-1] // 2).reshape(images.shape)


def shift_and_add(images: Tensor, kernel: Tensor) -> Tensor:
    """The same convolution, one shifted image per pixel of the kernel that is not 0: for a line, few of its pixels."""
    height, width = images.shape[2:]
    radius = kernel.shape[-1] // 2
    blurred = torch.zeros_like(images)
    for i, j in kernel.nonzero().tolist():
        down, right = i - radius, j - radius
        rows, columns = height - abs(down), width - abs(right)
        if rows > 0 and columns > 0:
            top, left = max(0, -down), max(0, -right)
            source = images[..., top + down :, left + right :][..., :rows, :columns]
            blurred[..., top : top + rows, left : left + columns].add_(source, alpha=float(kernel[i, j]))
    return blurred
