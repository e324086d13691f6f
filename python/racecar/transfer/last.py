"""The last operation of a model with weights, and what stands behind it: where a pretrained model meets a new task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from racecar_kernels import describe

from ..hooks import Boundary
from ..wrapping import Reversible

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OPERATIONS = (*describe.TIED, *TRANSPOSED)


@dataclass(frozen=True)
class Last:
    """The operation, a module of `OPERATIONS`, and (name, module) of what runs behind it, as far as that is known."""

    name: str
    op: Any
    behind: tuple[tuple[str, nn.Module], ...]

    @property
    def linear(self) -> bool:
        return isinstance(self.op, nn.Linear)

    @property
    def outputs(self) -> int:
        return self.op.out_features if self.linear else self.op.out_channels

    def __str__(self) -> str:
        return f"layer {self.name!r} ({type(self.op).__name__})"


def refuse_wrapped(model: object, argument: str) -> nn.Module:
    """`model`, if it is a module that racecar.wrap has nothing to do with (any more).

    Raises TypeError for anything but a module, ValueError if it is wrapped, or is or has a part of a wrapped model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument} must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if isinstance(module, Reversible) or any(isinstance(hook, Boundary) for hook in hooks):
            where = f"part {name!r} of {argument} is" if name else f"{argument} is"
            raise ValueError(
                f"{where} wrapped by racecar.wrap, or a part of a wrapped model; call unwrap() on that first"
            )
    return model


def is_chain(module: nn.Module) -> bool:
    """Whether it is an nn.Sequential that runs its modules in their order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def find_last(model: nn.Module, name: str | None) -> Last:
    """The last Linear, ConvNd or ConvTransposeNd in the order of registration, or the one called `name`.

    In a (nested) nn.Sequential that order is the order of execution. Elsewhere a `name` says that it is not trusted:
    then only the rest of the outermost nn.Sequential that has the operation in it counts as behind it.

    Raises:
        ValueError: there is none, or it cannot be changed by itself: not yet initialised, used or shared elsewhere, or
            with a weight that is computed.
        TypeError: `name` is no string.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    scope: str | None = ""  # the whole model
    if name is None:
        name = _last_name(model, modules)
    else:
        _check_name(model, dict(modules), name)
        scope = _outermost_chain(model, name)
    at = [n for n, _ in modules].index(name)
    behind = [(n, m) for n, m in modules[at + 1 :] if scope is not None and (not scope or n.startswith(f"{scope}."))]
    last = Last(name, modules[at][1], tuple(behind))
    check_own_weight(last.name, last.op)
    _check_shared(model, modules, last)
    return last


def check_own_weight(name: str, op: nn.Module) -> None:
    """Raises ValueError if the weight is not there yet, or not a parameter of the operation itself."""
    kind = type(op).__name__
    if any(is_lazy(p) for p in op.parameters()):
        raise ValueError(f"layer {name!r} ({kind}) is lazy and has no weight yet; run one forward first")
    if parametrize.is_parametrized(op):
        raise ValueError(
            f"layer {name!r} ({kind}) computes its weight by a parametrization; give it a weight of its own first: "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if "weight" not in op._parameters:
        raise ValueError(
            f"the weight of layer {name!r} ({kind}) is no parameter but computed by a hook; give it one first, with "
            "torch.nn.utils.remove_weight_norm or remove_spectral_norm"
        )


def _last_name(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> str:
    names = [name for name, module in modules if describe.is_a(module, OPERATIONS)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no last layer to change: no nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d or "
            "transposed convolution is in it"
        )
    return names[-1]


def _check_name(model: nn.Module, modules: dict[str, nn.Module], name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be None or a module's name such as 'head.1', got {name!r}")
    candidates = [n for n, module in modules.items() if describe.is_a(module, OPERATIONS)]
    if name in candidates:
        return
    found = f"is a {type(modules[name]).__name__}" if name in modules else "is not there"
    raise ValueError(
        f"name must be that of a linear layer or convolution of this {type(model).__name__}, but {name!r} {found}; "
        f"it has {', '.join(map(repr, candidates)) or 'none'}"
    )


def _outermost_chain(model: nn.Module, name: str) -> str | None:
    """Name of the outermost nn.Sequential around `name`, whose order is that of execution; None if there is none."""
    parts = name.split(".")
    scopes = [".".join(parts[:i]) for i in range(len(parts))]
    return next((scope for scope in scopes if is_chain(model.get_submodule(scope))), None)


def _check_shared(model: nn.Module, modules: list[tuple[str, nn.Module]], last: Last) -> None:
    uses = [name for name, module in modules if module is last.op]
    if len(uses) > 1:
        raise ValueError(f"{last} is used in several places ({', '.join(map(repr, uses))}), which all would change")
    own = {id(p) for p in last.op.parameters()}
    ours = {f"{last.name}.{n}".lstrip(".") for n, _ in last.op.named_parameters()}
    others = [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in own and n not in ours]
    if others:
        raise ValueError(
            f"{last} shares its weight with {', '.join(map(repr, others))}, which would end; give it a weight of its "
            "own first"
        )
