"""Watches a model's own forward, call by call, and runs the reverse of every planned layer when its y is there.

What the planner found is what is looked for: a call is known by its weight, and where its input came from by the trail
that pooling, norms and activations leave. Everything else in the forward may differ from step to step; a layer that is
not called does not count.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..hooks import Boundary
from . import calls
from .calls import FAMILIES, Family
from .modes import CELLS, CallMode, projections
from .plan import GraphLayer

if TYPE_CHECKING:
    from .engine import GraphEngine, GraphRun


class Step(NamedTuple):
    """One call on the way: what it was called with, as far as the reverse needs that.

    `kind`: which norm, activation or pooling it is; `x`: its input, of pooling, up-sampling and dropout alone;
    `tensors`: of a norm its scale, shift and running statistics, of PReLU its slopes; `training`: whether a norm took
    statistics.
    """

    family: Family
    kind: str
    x: Tensor | None
    tensors: tuple[Any, ...] = ()
    training: bool = True


class Seen(NamedTuple):
    """What a layer of a forward was called with."""

    weight: Tensor
    bias: Tensor | None
    latent: list[Step]


class Trail(NamedTuple):
    """Where a tensor came from.

    `steps`: the calls since the last other operation. `layer`, `ahead`: the layer whose y it leads to, in how many
    calls. `behind`: the layer whose y it is. `handed_on`: an operation of no family gave the tensor itself back, as
    `contiguous` may, so that its steps may or may not be what was planned. `tied`: the first step works on what a tied
    operation gave.
    """

    steps: tuple[Step, ...] = ()
    layer: int = -1
    ahead: int = 0
    behind: int = -1
    handed_on: bool = False
    tied: bool = False


_NEW = Trail()


class Trails:
    """Of the tensors that are alive. An entry goes with its tensor, and with it what it holds."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[weakref.ref[Tensor], Trail]] = {}

    def of(self, tensor: Tensor) -> Trail:
        known = self._at.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else _NEW

    def set(self, tensor: Tensor, trail: Trail) -> None:
        key, at = id(tensor), self._at
        self._at[key] = (weakref.ref(tensor, lambda _: at.pop(key, None)), trail)


class TrailsByMemory:
    """The same where FSDP2 hands every block aliases of what it was given: found by where it lies, not by identity.

    Memory is used again: what another call writes there has no trail, and a trail that leads to a y does so once.
    """

    def __init__(self) -> None:
        self._at: dict[Any, Trail] = {}

    def of(self, tensor: Tensor) -> Trail:
        place = self._place(tensor)
        trail = self._at.get(place, _NEW)
        if trail.layer >= 0:
            self._at[place] = Trail(trail.steps)
        return trail

    def set(self, tensor: Tensor, trail: Trail) -> None:
        self._at[self._place(tensor)] = trail

    def forget(self, result: object, given: tuple[Any, ...]) -> None:
        """What a call of no family has written; an alias of what it was given is that still."""
        if not isinstance(result, Tensor):
            return
        if not any(isinstance(t, Tensor) and t.data_ptr() == result.data_ptr() for t in given):
            self._at.pop(self._place(result), None)

    @staticmethod
    def _place(tensor: Tensor) -> Any:
        return tensor.data_ptr(), tensor.shape, tensor.stride()


class TracedTrails:
    """The same while torch.compile traces, which knows neither identities nor weak references; nothing is held then."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Trail]] = []

    def of(self, tensor: Tensor) -> Trail:
        for known, trail in reversed(self._known):
            if known is tensor:
                return trail
        return _NEW

    def set(self, tensor: Tensor, trail: Trail) -> None:
        self._known.append((tensor, trail))


class Notice(Boundary):
    """A hook behind a module whose function torch.compile does not hand to a mode."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        engine = self.engine
        if engine is None or engine.run is None or not torch.compiler.is_compiling():
            return None
        kind = "hardswish" if isinstance(module, nn.Hardswish) else "hardsigmoid"
        return engine.run.watch.unseen(args[0], output, kind)


UNSEEN = (nn.Hardswish, nn.Hardsigmoid)  # PyTorch counts their functions among those that cannot be overridden


class Watch(CallMode):
    """One forward under way."""

    def __init__(self, engine: GraphEngine, run: GraphRun) -> None:
        super().__init__()
        self.engine, self.run = engine, run
        self.trails: Any = Trails()
        if torch.compiler.is_compiling():
            self.trails = TracedTrails()
        self._by_memory = engine.shards is not None and bool(engine.shards.block_of)
        if self._by_memory:
            self.trails = TrailsByMemory()
        self._next = 0
        self._uses = [0] * len(engine.weights)

    def called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        family = FAMILIES.get(func)
        if family is None:
            if func in CELLS:
                for x, weight, bias in projections(args, kwargs):
                    self._inside(x, weight, bias)
            result = func(*args, **kwargs)
            if self._by_memory:
                self.trails.forget(result, args if not calls.works_in_place(func, kwargs) else ())
            elif args and isinstance(args[0], Tensor):
                self._other(func, args[0], kwargs, result)
            return result
        if family is Family.TIED:
            return self._tied(func, args, kwargs)
        x = args[0] if args else kwargs["input"]
        trail = self.trails.of(x)  # before the call, which may change x in place
        given, in_place = x, calls.works_in_place(func, kwargs) or (len(args) > 3 and args[3] is True)
        if family is not Family.LATENT and in_place:
            x = x.clone()  # a dropout in place: d is what was there before
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):  # pooling that returns indices
            return result
        if family is Family.LATENT:
            trail = self._latent(trail, calls.kind_of(func), func, args, kwargs)
            return self._went_on(trail, result, given if in_place else None)
        layer, ahead = self._on_the_way(trail, family)
        behind = trail.behind if family is Family.SILENT else -1
        steps = (*trail.steps, Step(family, calls.kind_of(func), x))
        trail = Trail(steps, layer, ahead, behind, trail.handed_on, trail.tied)
        return self._went_on(trail, result, given if in_place else None)

    def _other(self, func: Any, x: Tensor, kwargs: dict[str, Any], result: Any) -> None:
        """A call of no family has read x: what it wrote there, or gave back as it is, did not come the same way."""
        trail = self.trails.of(x)
        if trail == _NEW:
            return
        if calls.works_in_place(func, kwargs):
            self.trails.set(x, _NEW)
        elif result is x:
            self.trails.set(x, Trail(trail.steps, handed_on=True, tied=trail.tied))

    def _on_the_way(self, trail: Trail, family: Family) -> tuple[int, int]:
        """The layer to whose y a call of this family leads from here, and in how many calls; -1, 0: to none."""
        if trail.layer < 0:
            return -1, 0
        onward = self.engine.layer(trail.layer).onward
        return (trail.layer, trail.ahead - 1) if onward[len(onward) - trail.ahead] is family else (-1, 0)

    def unseen(self, x: Tensor, result: Tensor, kind: str) -> Tensor:
        """What a call would have given that torch.compile does not hand to a mode, `UNSEEN` has which."""
        return self._went_on(self._latent(self.trails.of(x), kind, None, (), {}), result)

    def _went_on(self, trail: Trail, result: Tensor, changed: Tensor | None = None) -> Tensor:
        """Remembers where a result came from, and runs the reverse of the layer whose y it is.

        `changed`: what was changed in place into the result, which the forward may go on with instead.
        """
        if trail.layer >= 0 and trail.ahead == 0:
            result = self.engine.left(trail.layer, result, self.run)
            trail = trail._replace(layer=-1, behind=self._ends(trail.layer))
        self.trails.set(result, trail)
        if changed is not None and changed is not result:
            self.trails.set(changed, trail)
        return result

    def _latent(self, trail: Trail, kind: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trail:
        if trail.behind >= 0:
            name = self.engine.layer(trail.behind).name
            raise RuntimeError(
                f"a norm or activation follows layer {name!r} that was not there when the model was planned; {remedy()}"
            )
        tensors: tuple[Any, ...] = ()
        training = True
        if func in calls.NORMS:
            tensors = calls.norm_tensors(func, args, kwargs)
            training = calls.in_training(func, args, kwargs)
        elif func in calls.SLOPED:
            tensors = (args[1] if len(args) > 1 else kwargs["weight"],)
        if self.engine.shards is not None:
            tensors = self.engine.shards.kept(tensors)
        # behind pooling, a walk back from the next layer ends here; of a dropout nobody needs the input any more
        tied = trail.tied
        before = [Step(s.family, s.kind, None, s.tensors, s.training) for s in trail.steps]
        if any(s.family is not Family.LATENT and s.family is not Family.SILENT for s in before):
            before, tied = [], False
        layer, ahead = self._on_the_way(trail, Family.LATENT)
        steps = (*before, Step(Family.LATENT, kind, None, tensors, training))
        return Trail(steps, layer, ahead, -1, trail.handed_on, tied)

    def _tied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias = calls.tied_tensors(args, kwargs)
        m = self._layer_of(weight)
        if m < 0:
            result = func(*args, **kwargs)
            self.trails.set(result, Trail(tied=True))
            return result
        layer = self.engine.layer(m)
        self._enter(m, layer, x, weight, bias)
        result = func(*args, **kwargs)
        if layer.ahead == 0:
            result = self.engine.left(m, result, self.run)
            self.trails.set(result, Trail(behind=self._ends(m), tied=True))
        else:
            self.trails.set(result, Trail((), m, layer.ahead, tied=True))
        return result

    def _ends(self, m: int) -> int:
        """m where no norm or activation reads the y of layer m. By memory that is not known: it is used again."""
        return -1 if self._by_memory or self.engine.layer(m).goes_on else m

    def _inside(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """A linear layer in a recurrent cell, whose result nobody sees: it is computed again."""
        m = self._layer_of(weight)
        if m >= 0:
            self._enter(m, self.engine.layer(m), x, weight, bias)
            self.engine.left(m, F.linear(x, weight, bias), self.run)

    def _layer_of(self, weight: Tensor) -> int:
        """The layer that this use of the weight is; -1: none. Looked for from where the last one was found."""
        weights = self.engine.weights
        for k in range(len(weights)):
            i = (self._next + k) % len(weights)
            own = weights[i]
            if own[0].weight() is weight:
                use = self._uses[i]
                self._uses[i] = use + 1
                self._next = (i + 1) % len(weights)
                return own[1].get(use, -1)
        return -1

    def _enter(self, m: int, layer: GraphLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        trail = self.trails.of(x)
        steps = trail.steps
        back, made = len(layer.back), len(layer.made)
        way = [s.kind for s in steps[len(steps) - back - made :]]
        beyond = [s.family for s in steps[: max(0, len(steps) - back - made)] if s.family is not Family.SILENT]
        more = bool(beyond) and beyond[-1] is Family.LATENT and not (layer.first or layer.further or trail.handed_on)
        # What begins elsewhere than was planned is another path: a block is left out, and its addition with it. By
        # memory, what another operation handed on as it is, or wrote unseen, looks as if it had come the same way.
        more = more and trail.tied == layer.behind_tied and not self._by_memory
        if len(steps) < back + made or way != [*layer.kinds] or more:
            raise RuntimeError(
                f"what leads to layer {layer.name!r} is not what it was when the model was planned "
                f"({_words(layer.kinds)} then, {_words([s.kind for s in steps])} now); "
                f"{remedy()}"
            )
        d: Any = steps[len(steps) - back].x if back else x
        own = steps[len(steps) - back - made : len(steps) - back]
        seen = Seen(weight, bias, [s for s in own if s.family is Family.LATENT])
        self.engine.entered(m, d, seen, self.run)


def remedy() -> str:
    """What may have happened where a forward is not what was planned."""
    if torch.compiler.is_compiling():
        return (
            "torch.compile does not show calls of F.hardswish and F.hardsigmoid: use nn.Hardswish and nn.Hardsigmoid; "
            "or unwrap and wrap again after changing the model"
        )
    return (
        "unwrap and wrap again after changing the model; where hooks take part in its forward, with example=x, which "
        "runs them"
    )


def _words(kinds: Sequence[str]) -> str:
    return ", ".join(kinds) or "nothing"
