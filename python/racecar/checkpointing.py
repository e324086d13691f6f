"""Activation checkpointing around a wrapped model: its forward runs again inside the backward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from .engine import Engine

_REENTRANT = (
    "reverse_loss has no gradient under a reentrant activation checkpoint, which runs the forward without a graph "
    "first; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)


_INSIDE = (
    "an activation checkpoint inside the model runs layer {name!r}, whose reverse would be lost when its forward runs "
    "again; put the checkpoint around the wrapped model instead"
)


class Surroundings(NamedTuple):
    """Whether a forward began with gradients, and what keeps the tensors that it saves."""

    grad: bool = False
    hook: Any = None

    def check(self, name: str) -> None:
        """Raises RuntimeError where layer `name` runs in a checkpoint that began inside this forward."""
        if self.grad and not torch.is_grad_enabled() and _in_reentrant():
            raise RuntimeError(_INSIDE.format(name=name))
        hook = _saving()
        if hook is not self.hook and getattr(hook, "__qualname__", "").startswith("_checkpoint_hook."):
            raise RuntimeError(_INSIDE.format(name=name))


def surroundings() -> Surroundings:
    """As they are now; torch.compile has no such hooks, and checkpoints inside its graphs run again as a whole."""
    return Surroundings() if torch.compiler.is_compiling() else Surroundings(torch.is_grad_enabled(), _saving())


def _saving() -> Any:
    """What tensors go through now that are saved for the backward; None: nothing."""
    hooks = None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks else None


def _in_reentrant() -> bool:
    """Whether a function of autograd runs this, as a reentrant checkpoint does, PyTorch's or another library's.

    Any other block without gradients is the user's.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch.autograd.function.FunctionCtx):
                return True
        frame = frame.f_back
    return False


def runs_again() -> bool:
    """Whether this forward runs inside a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def first_result_kept(engine: Engine) -> Iterator[None]:
    """`reverse_loss` stays that of the first time, which the backward pass belongs to.

    Raises:
        RuntimeError: the first time had no graph, so that the reverse loss has silently had no gradient.
    """
    first = engine.result
    try:
        yield  # a checkpoint may stop the forward by an exception as soon as it has all that it wants
        again = engine.result
        if first is not None and again is not None and again.total.requires_grad and not first.total.requires_grad:
            raise RuntimeError(_REENTRANT)
    finally:
        engine.set_result(first)
