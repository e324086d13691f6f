"""A forward that leaves no trace: buffers, random states and attributes are afterwards what they were before."""

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
    plain = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    buffers = [(module, dict(module._buffers)) for module in plain]
    # A scripted module keeps its buffers for itself, and cannot be given others: theirs are written back.
    scripted = [m for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]
    values = [(buffer, buffer.clone()) for module in scripted for buffer in module.buffers(recurse=False)]
    with torch.random.fork_rng(devices=devices):
        try:
            for module, own in buffers:
                module._buffers.update({k: _copy(b) for k, b in own.items()})
            yield
        finally:
            for module, own in buffers:
                module._buffers.update(own)
            with torch.no_grad():
                for buffer, value in values:
                    buffer.copy_(value)


def _copy(buffer: Tensor | None) -> Tensor | None:
    """A lazy one has nothing yet that a forward could change."""
    return buffer if buffer is None or is_lazy(buffer) else buffer.clone()


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """What the forward sets as an attribute inside, a stand-in of a trace for example, is gone afterwards."""
    before = [
        (module, dict(module.__dict__), dict(module._buffers))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for module, own, buffers in before:
            module.__dict__.clear()
            module.__dict__.update(own)
            module._buffers.clear()
            module._buffers.update(buffers)
