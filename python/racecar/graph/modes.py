"""Sees every PyTorch function that a forward calls, also those inside PyTorch's own attention.

A `TorchFunctionMode` rather than a rewritten forward: whatever Python the model's forward runs, it stays the model's
own, and torch.compile traces through the mode.
"""

from __future__ import annotations

from abc import abstractmethod
from types import FunctionType
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_ATTENTION = F.multi_head_attention_forward
# The same code, which does not hand itself to the mode as a whole: the projections inside it are seen one by one.
_OPEN_ATTENTION = FunctionType(
    _ATTENTION.__code__,
    {**_ATTENTION.__globals__, "has_torch_function": lambda tensors: False},
    _ATTENTION.__name__,
    _ATTENTION.__defaults__,
    _ATTENTION.__closure__,
)
_OPEN_ATTENTION.__kwdefaults__ = _ATTENTION.__kwdefaults__
CELLS = frozenset((torch.gru_cell, torch.lstm_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell))


class CallMode(TorchFunctionMode):
    """Hands every call to `called`, during which the mode is off."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATTENTION:
            with self:
                return _OPEN_ATTENTION(*args, **(kwargs or {}))
        return self.called(func, args, kwargs or {})

    @abstractmethod
    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the function and returns its result, or what is to take its place."""


def projections(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any, Any]]:
    """(input, weight, bias) of the two linear layers inside a recurrent cell: from its input, and from its state."""
    names = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    state = given["hx"][0] if isinstance(given["hx"], (tuple, list)) else given["hx"]
    return [
        (given["input"], given["w_ih"], given.get("b_ih")),
        (state, given["w_hh"], given.get("b_hh")),
    ]
