"""A forward that leaves no trace: buffers and random states are afterwards what they were before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the model works on copies of its buffers and of the random states of the devices it lives on."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({t.device for t in tensors if t.device.type == "cuda"}, key=str)
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    with torch.random.fork_rng(devices=devices):
        try:
            for module, own in buffers:
                module._buffers.update({k: _copy(b) for k, b in own.items()})
            yield
        finally:
            for module, own in buffers:
                module._buffers.update(own)


def _copy(buffer: Tensor | None) -> Tensor | None:
    """A lazy one has nothing yet that a forward could change."""
    return buffer if buffer is None or is_lazy(buffer) else buffer.clone()
