"""Chooses how a model is planned: as a chain of modules, or by the calls of its forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from . import graph
from .graph.network import Network
from .plan import Plan, is_chain, plan_chain


def plan_of(model: nn.Module, example: Any) -> Plan:
    """Of a chain by its modules, of any other model by its forward's calls."""
    if is_chain(model):
        plan = plan_chain(model)
        if plan.obstacle is None:
            return plan
    if example is not None:
        args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
        return graph.plan_network(_recorded(model, args, example if isinstance(example, dict) else {}), model)
    try:
        with _as_trained(model):
            network = graph.trace(model)
        return graph.plan_network(network, model)
    except graph.TraceError as error:
        raise ValueError(
            f"the forward of {type(model).__name__} cannot be followed without running it ({error}); give wrap an "
            "input to run it on once: racecar.wrap(model, lam, example=x)"
        ) from error


def _recorded(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Network:
    """The forward as it will train; in eval mode where it does not run so, a batch norm over a single number say."""
    if not model.training:
        try:
            with _as_trained(model):
                return graph.record(model, args, kwargs)
        except Exception:  # the model's own code; what it says in its own mode is raised
            pass
    return graph.record(model, args, kwargs)


@contextmanager
def _as_trained(model: nn.Module) -> Iterator[None]:
    """A model in eval mode is planned in training mode, in which alone the reverse pass runs."""
    modes = [] if model.training else [(module, module.training) for module in model.modules()]
    if modes:
        model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def choose_variant(variant: str, memory: str, plan: Plan) -> str:
    """`full` or `local`. Raises ValueError for a full reverse without a unique path, or with deferred memory."""
    if variant == "full" and plan.obstacle is not None:
        raise ValueError(
            f"variant='full' needs a unique path from output to input, but {plan.obstacle}; "
            "use variant='local' (or 'auto'), or wrap a chain inside the model"
        )
    if variant == "auto":
        variant = "full" if plan.obstacle is None and not plan.branches else "local"
    if variant == "full" and memory == "deferred":
        raise ValueError("memory='deferred' needs variant='local': a full reverse can use 'store' or 'recompute'")
    return variant
