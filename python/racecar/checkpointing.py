"""Activation checkpointing around a wrapped model: its forward runs again inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .engine import Engine

_REENTRANT = (
    "reverse_loss has no gradient under a reentrant activation checkpoint, which runs the forward without a graph "
    "first; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)


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
