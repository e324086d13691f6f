"""λ over training: schedules that give a factor for every step, and what applies them to a wrapped model.

    from racecar.schedules import LamSchedule, cosine, warmup

    schedule = LamSchedule(net, warmup(500, then=cosine(10_000)))
    for step, (x, t) in enumerate(batches):
        schedule.set(step)
        ...

A schedule is a function of the step's number alone, so a run resumes wherever its step counter does. Its factor
multiplies the λ that the model had when `LamSchedule` was made. A new λ never recompiles a compiled model; 0, where no
reverse pass is computed at all, is one more graph beside the one with it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from operator import index
from typing import Any

from torch import nn

from .wrapping import wrapped_parts


class Schedule(ABC):
    """step (0, 1, ...) -> factor of λ, at least 0. A value: equal schedules compare equal, and can be pickled."""

    def __call__(self, step: int) -> float:
        """The factor at this step.

        Raises:
            TypeError: the step is no whole number.
            ValueError: the step is negative.
        """
        return self.factor(_whole("step", step, least=0))

    @abstractmethod
    def factor(self, step: int) -> float:
        """The factor at a step that was checked."""


@dataclass(frozen=True)
class _Constant(Schedule):
    value: float

    def factor(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Warmup(Schedule):
    steps: int
    then: Schedule

    def factor(self, step: int) -> float:
        if step >= self.steps:
            return self.then(step - self.steps)
        return self.then(0) * (step + 1) / (self.steps + 1)


@dataclass(frozen=True)
class _Decay(Schedule):
    shape: str
    steps: int
    end: float

    def factor(self, step: int) -> float:
        done = min(step / self.steps, 1.0)
        if self.shape == "exponential":
            return float(self.end**done)
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.end + (1 - self.end) * left


@dataclass(frozen=True)
class _OffAfter(Schedule):
    steps: int
    before: Schedule

    def factor(self, step: int) -> float:
        return self.before(step) if step < self.steps else 0.0


@dataclass(frozen=True)
class _Every(Schedule):
    steps: int
    of: Schedule

    def factor(self, step: int) -> float:
        return 0.0 if step % self.steps else self.steps * self.of(step)


def constant(factor: float = 1.0) -> Schedule:
    """Always the same factor."""
    return _Constant(_number("factor", factor))


def warmup(steps: int, then: Schedule | None = None) -> Schedule:
    """Rises linearly over the first `steps` steps, (step + 1) / (steps + 1), to what `then` begins with.

    `then` (None: `constant()`) counts its steps from the end of the warm-up.
    """
    return _Warmup(_whole("steps", steps, least=1), _schedule("then", then))


def linear(steps: int, end: float = 0.0) -> Schedule:
    """Falls from 1 to `end` along a line over `steps` steps, and stays there."""
    return _Decay("linear", _whole("steps", steps, least=1), _number("end", end))


def cosine(steps: int, end: float = 0.0) -> Schedule:
    """Falls from 1 to `end` along half a cosine over `steps` steps, and stays there."""
    return _Decay("cosine", _whole("steps", steps, least=1), _number("end", end))


def exponential(steps: int, end: float) -> Schedule:
    """Falls from 1 to `end` (above 0) by the same ratio at every one of `steps` steps, and stays there."""
    if _number("end", end) == 0:
        raise ValueError(
            "end of an exponential decay must be above 0, which it would never reach; use linear or cosine"
        )
    return _Decay("exponential", _whole("steps", steps, least=1), float(end))


def off_after(steps: int, before: Schedule | None = None) -> Schedule:
    """`before` (None: `constant()`) for the first `steps` steps, then 0, at the cost of plain training."""
    return _OffAfter(_whole("steps", steps, least=0), _schedule("before", before))


def every(steps: int, of: Schedule | None = None) -> Schedule:
    """A reverse pass on every `steps`-th step alone, at `steps` times the λ of `of` (None: `constant()`).

    The other steps cost what plain training costs. Over many steps the gradient is that of `of`.
    """
    return _Every(_whole("steps", steps, least=1), _schedule("of", of))


class LamSchedule:
    """Sets the λ of a wrapped model, or of all wrapped parts of a larger one, to schedule(step) times what it was.

    Args:
        model: wrapped by `racecar.wrap`, or with wrapped parts. A `DistributedDataParallel` around it will do, too.
        schedule: step -> factor: one of this module, or a function of your own.

    Attributes:
        base: λ of every wrapped part with the factor 1, by the part's prefix ("" for the model itself).
        step: the step that was set last; None before the first.

    Raises:
        TypeError: the schedule cannot be called, or gives no number.
        ValueError: no part of the model is wrapped.
    """

    def __init__(self, model: nn.Module, schedule: Any) -> None:
        if not callable(schedule):
            raise TypeError(f"schedule must be a function of the step, such as warmup(500), got {schedule!r}")
        self.parts = wrapped_parts(model)
        if not self.parts:
            raise ValueError(
                f"no part of this {type(model).__name__} is wrapped, so it has no λ; call racecar.wrap first"
            )
        self.schedule = schedule
        self.base = {where: part.lam for where, part in self.parts.items()}
        self.step: int | None = None

    def set(self, step: int) -> float:
        """Call it before the forward of that step. Returns the factor."""
        step = _whole("step", step, least=0)
        factor = _number(f"the schedule's factor at step {step}", self.schedule(step))
        for where, part in self.parts.items():
            part.lam = [factor * value for value in self.base[where]]
        self.step = step
        return factor

    def state_dict(self) -> dict[str, Any]:
        """The λ that the factors refer to, and the last step."""
        return {"step": self.step, "base": {where: list(lam) for where, lam in self.base.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken: λ is that step's at once.

        Raises:
            ValueError: it belongs to a model with other wrapped parts or another number of layers.
        """
        counts = {where: len(lam) for where, lam in state["base"].items()}
        own = {where: len(lam) for where, lam in self.base.items()}
        if counts != own:
            raise ValueError(f"this λ belongs to the wrapped parts {counts} (name: layers), the model's are {own}")
        self.base = {where: list(lam) for where, lam in state["base"].items()}
        self.step = state["step"]
        if self.step is not None:
            self.set(self.step)


def _whole(name: str, value: Any, *, least: int) -> int:
    try:
        number = index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__} {value!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be finite and at least 0, got {number}")
    return number


def _schedule(name: str, value: Any) -> Schedule:
    if value is None:
        return constant()
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a schedule such as cosine(1000), got {type(value).__name__} {value!r}")
    return value
