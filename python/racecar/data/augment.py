"""Augmentation of whole batches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(
    x: Tensor, generator: torch.Generator | None = None, *, padding: int = 4, flip: bool = True
) -> Tensor:
    """Moves every image by up to `padding` pixels each way, zeros coming in, and mirrors every second one.

    The augmentation of He et al. 2016, section 4.2: padded on all sides, a random part of the old size cut out.

    Args:
        x: images (images, channels, height, width), of any dtype, on any device.
        generator: of the random numbers, on the CPU; None: PyTorch's own.
        padding: largest shift in pixels. flip: whether left and right are exchanged, with probability ½.

    Returns:
        Images of the same shape, dtype and memory format.

    Raises:
        ValueError: x has another rank, or a negative padding.
    """
    if x.dim() != 4:
        raise ValueError(f"x must have the shape (images, channels, height, width), got {tuple(x.shape)}")
    if padding < 0:
        raise ValueError(f"padding must be 0 or more pixels, got {padding}")
    count, _, height, width = x.shape
    shifts = torch.randint(2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = (torch.arange(height) + shifts[0]).to(x.device)
    across = torch.arange(width).expand(count, -1)
    if flip:
        across = torch.where(mirrored, width - 1 - across, across)
    columns = (across + shifts[1]).to(x.device)
    padded = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)  # rows and columns are chosen with all their channels
    image = torch.arange(count, device=x.device)[:, None, None]
    moved = padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    last = x.is_contiguous(memory_format=torch.channels_last)
    return moved.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
