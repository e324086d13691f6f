"""Finds a model's graph of calls by running its forward once: whatever Python it is made of, it only has to run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from racecar_kernels import describe

from ..undisturbed import undisturbed
from . import calls
from .calls import Family
from .modes import CELLS, CallMode, projections
from .network import NO_PARAMETER, NOT_OF_THE_INPUT, Call, Network


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Network:
    """The calls of `model(*args, **kwargs)`. Without gradient; changes no buffer and no random state."""
    mode = _Recorder(model)
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor):
            mode.know(leaf, Network.INPUT)
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: mode.network.whole.add(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential)
    ]
    try:
        result = _run(model, mode, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for leaf in _leaves(result):
        place = mode.place_of(leaf)
        if place is not None:
            mode.network.consumers(place).append(Network.OUTPUT)
    return mode.network


def _leaves(result: object, depth: int = 3) -> Iterator[object]:
    """Of what a forward returned, also inside objects that PyTorch's trees do not know."""
    for leaf in tree_leaves(result):
        yield leaf
        own = {} if isinstance(leaf, (Tensor, nn.Module)) else getattr(leaf, "__dict__", {})
        if own and depth:
            yield from _leaves(dict(own), depth - 1)


def _run(model: nn.Module, mode: _Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.no_grad(), undisturbed(model), nn.utils.parametrize.cached(), mode:
        return model(*args, **kwargs)


class Owners:
    """Where a weight lives: by its identity, so that functional calls of a parameter are found, too."""

    def __init__(self, model: nn.Module) -> None:
        self.parametrised: list[tuple[str, nn.Module, str]] = []
        self.known: dict[int, tuple[str, nn.Module, str]] = {}
        for path, module in model.named_modules():
            own = describe.is_a(module, describe.TIED)
            for attribute, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in self.known:
                    self.known[id(parameter)] = (_name(path, attribute, own), module, attribute)
            if describe.is_a(module, describe.TIED) and "weight" in module.__dict__:  # hooks of the older norms set it
                self.parametrised.append((path or "weight", module, "weight"))
            if "parametrizations" in module._modules:
                for attribute in module.parametrizations:
                    self.parametrised.append((_name(path, attribute, own), module, attribute))

    def of(self, weight: object) -> tuple[str, nn.Module, str] | None:
        """Name, module and attribute; None where the weight was computed in the forward."""
        found = self.known.get(id(weight))
        if found is not None:
            return found
        return next((own for own in self.parametrised if getattr(own[1], own[2]) is weight), None)


def _name(path: str, attribute: str, own: bool) -> str:
    """A Linear or convolution goes by its path, any other weight by its own name."""
    if not path:
        return attribute
    return path if own and attribute == "weight" else f"{path}.{attribute}"


class _Recorder(CallMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.network = Network()
        self.owners = Owners(model)
        self._places: dict[int, tuple[Tensor, int]] = {}  # with the tensor, whose id nothing else gets while it is held
        self._made_of: dict[int, tuple[Tensor, str]] = {}  # what is computed of a parameter alone: that one's name

    def know(self, tensor: Tensor, place: int) -> None:
        self._places[id(tensor)] = (tensor, place)

    def place_of(self, value: object) -> int | None:
        known = self._places.get(id(value))
        return None if known is None else known[1]

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tuple(self._inputs(args, kwargs))
        if func in CELLS:
            self._cell(args, kwargs)
        result = func(*args, **kwargs)
        changed = calls.works_in_place(func, kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)] or ([args[0]] if changed else [])
        if not inputs:
            self._remember_weight(made, args, kwargs)
        if made and (inputs or calls.FAMILIES.get(func) is Family.TIED):
            place = self.network.add(self._call(func, args, kwargs, inputs))
            for tensor in made:
                self.know(tensor, place)
        return result

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[int]:
        for leaf in tree_leaves((args, kwargs)):
            place = self.place_of(leaf) if isinstance(leaf, Tensor) else None
            if place is not None:
                yield place

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: tuple[int, ...]) -> Call:
        family = calls.FAMILIES.get(func, Family.OTHER)
        first = self.place_of(args[0] if args else kwargs.get("input"))
        if family not in (Family.OTHER, Family.TIED) and first != inputs[0]:
            family = Family.OTHER  # its first argument is no result of the forward
        call = Call(calls.name_of(func), family, inputs)
        if family is Family.TIED and first is None:
            call.reason = NOT_OF_THE_INPUT
        if family is Family.OTHER:
            return call
        try:
            call.module = calls.described(func, args, kwargs)
        except describe.UnsupportedError as reason:
            call.reason = str(reason)
        if family is Family.TIED:
            self._own(call, calls.tied_tensors(args, kwargs)[1])
        return call

    def _remember_weight(self, made: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for leaf in tree_leaves((args, kwargs)):
            known = self.owners.known.get(id(leaf))
            name = known[0] if known is not None else self._made_of.get(id(leaf), (None, None))[1]
            if name is not None:
                self._made_of.update({id(tensor): (tensor, name) for tensor in made})
                return

    def _own(self, call: Call, weight: Tensor) -> None:
        found = self.owners.of(weight)
        if found is None:
            call.reason = NO_PARAMETER
            call.name = self._made_of.get(id(weight), (None, call.name))[1]
            return
        call.name, call.owner = found[0], found[1:]
        if describe.is_a(found[1], describe.TIED):
            call.module = found[1]

    def _cell(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x, weight, bias in projections(args, kwargs):
            place = self.place_of(x)
            call = Call("linear", Family.TIED, () if place is None else (place,), hidden=True)
            call.module = calls.described(nn.functional.linear, (x, weight, bias), {})
            call.reason = NOT_OF_THE_INPUT if place is None else None
            self._own(call, weight)
            self.network.add(call)
