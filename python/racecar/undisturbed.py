"""A forward that leaves no trace: buffers, random states and attributes are afterwards what they were before."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        (module, [(name, value, _content(value)) for name, value in module.__dict__.items()])
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for module, own in before:
            module.__dict__.clear()
            for name, value, content in own:
                module.__dict__[name] = value
                if content is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(content)


def _content(value: object) -> Any:
    """What a list, a dictionary or a set holds; None of anything else."""
    return copy.copy(value) if type(value) in (list, dict, set, OrderedDict) else None
