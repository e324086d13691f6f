"""How a recipe tells what it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Listener:
    """Is told what a run does; every function may do nothing.

    Attributes:
        plan: the number of epochs to come, and of those that a resumed run has behind it.
        stage: what is being done now. advance: so many epochs are done.
    """

    plan: Callable[[int, int], None] = lambda epochs, done: None
    stage: Callable[[str], None] = lambda words: None
    advance: Callable[[int], None] = lambda epochs: None
