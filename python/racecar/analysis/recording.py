"""Runs a model for a look inside it, and leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..engine import Engine
from ..run import Run
from ..wrapping import engine_of, wrap


def check_samples(what: str, x: object) -> None:
    """Raises TypeError for what is no tensor, ValueError for one without samples."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{what} takes the model's input, a tensor, got {type(x).__name__}")
    if x.dim() == 0 or not x.numel():
        raise ValueError(f"{what} needs at least one sample, got x of shape {tuple(x.shape)}")


def check_count(name: str, value: object, least: int = 1) -> int:
    """`value`, if it is a whole number of at least `least`; else TypeError or ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's own mode, and the reverse loss of the last forward."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    modes = {module: module.training for module in model.modules()}
    results = [(engine, engine.result) for module in modes if (engine := engine_of(module)) is not None]
    model.eval()
    try:
        yield
    finally:
        for engine, result in results:
            engine.set_result(result)
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluated(model: nn.Module) -> Iterator[Engine]:
    """The reverse pass of a model in evaluation mode; a plain model is wrapped inside, and plain again afterwards."""
    with evaluation(model):
        engine = engine_of(model)
        mine = engine is None
        if engine is None:
            engine = engine_of(wrap(model, lam=0.0))
        if engine is None:
            raise RuntimeError("racecar.wrap has left no engine")
        try:
            yield engine
        finally:
            if mine:
                model.unwrap()  # type: ignore[operator]


def states_of(engine: Engine, run: Run) -> list[Tensor]:
    """d_1 .. d_{n+1} of a forward recorded with `reconstruct=True`, which refuses a model without a unique path.

    Of a model that goes on behind a chain from the input, those of the chain.
    """
    if run.y is None:
        raise RuntimeError("no forward was recorded")
    return [*run.targets[: engine.plan.chain], run.y]
