"""Watches a chain's own forward by hooks, or runs the whole chain as one autograd node where nobody else watches it.

Hooks stand where a layer receives its input and where the last one gives its output. They see d_1 .. d_{n+1} go by.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import racecar_kernels as rk
from racecar_kernels import Latent, describe

from . import sharding
from .chained import Chained
from .engine import Engine, Operands, Settings, check_received, version_of
from .plan import Plan
from .run import Run


class Boundary:
    """A hook of ours. Its module may be used several times: `at_call` says at which call which layer begins or ends.

    It does not own the engine: the model does, and would otherwise be kept alive by its own modules' hooks.
    """

    def __init__(self, engine: Any = None, index: int = 0):
        self._engine = None if engine is None else weakref.ref(engine)
        self.index = index
        self.at_call: dict[int, int] = {}

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy does nothing until the copied engine puts its own hooks on

    @property
    def engine(self) -> Any:
        """None if it is gone."""
        return None if self._engine is None else self._engine()

    def engine_and_layer(self) -> tuple[ChainEngine | None, int | None]:
        engine = self.engine
        if engine is None or engine.run is None:
            return None, None
        engine.run.calls[self.index] = call = engine.run.calls.get(self.index, 0) + 1
        return engine, self.at_call.get(call)


class Enter(Boundary):
    """Before the module whose input is d."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        engine, m = self.engine_and_layer()
        return None if engine is None or m is None else (engine.enter(m, args[0]), *args[1:])


class Leave(Boundary):
    """Behind the module whose output is y."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        engine, m = self.engine_and_layer()
        return None if engine is None or m is None else engine.leave(m, output)


def take_off(model: nn.Module) -> None:
    """Removes the hooks of ours."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, Boundary)]:
                del hooks[key]


class ChainEngine(Engine):
    """The reverse pass of a chain of modules."""

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings):
        super().__init__(model, plan, settings)
        self.chained = Chained(self, model)
        self.shards: sharding.Shards | None = None
        self._described: dict[tuple[bool, ...], tuple[list[rk.Layer], list[list[Latent | None]]]] = {}
        self._clone_d = [any(map(_in_place, layer.pre)) for layer in plan.layers]
        inside = {id(module) for module in plan.order}
        self._clone_y = any(_in_place(module) and id(module) not in inside for module in model.modules()) or any(
            map(_in_place, plan.order[plan.layers[-1].y + 1 :])
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for module in self.plan.order:
            self.detach(module)
        self.attach()

    def forward(self, model: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 1 and not kwargs and not isinstance(args[0], Tensor):  # how many there are, the forward says
            kind = type(args[0]).__name__
            raise TypeError(f"the model's input must be a tensor, got {kind}; torch.as_tensor makes one of numbers")
        self.shards = sharding.shards_of(model)
        if self.shards is not None:
            self.shards.check_norms(model, self.plan.layers)
        try:
            if torch.compiler.is_compiling() or self.chained.why_not(self, model, args, kwargs) is not None:
                return super().forward(model, own, args, kwargs)
            run = self.new_run(False)
            self.draw(run)
            out = self.chained.forward(self, run, args[0])
            self._gather_again(run.sums[-1], run, range(len(self.plan.layers)))
            self.finish(run)
            return out
        finally:
            self.shards = None  # what it has copied belongs to this forward's graph

    def why_layer_by_layer(self, model: nn.Module) -> str | None:
        return self.chained.why_not_model(self, model)

    @contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        if run.reconstruct:
            sharding.check_whole(layer.op for layer in self.plan.layers)
        # a parametrised weight is computed once for forward and reverse
        parametrised = any("parametrizations" in layer.op._modules for layer in self.plan.layers)
        with parametrize.cached() if parametrised else nullcontext():
            yield
        if len(run.targets) != len(self.plan.layers) or run.y is None:
            raise RuntimeError(
                f"the forward ran {len(run.targets)} of the {len(self.plan.layers)} planned layers "
                f"({', '.join(self.plan.names)}); unwrap and wrap again after changing the model"
            )
        if self.settings.variant == "local" and not run.reconstruct:
            self.gather(run)

    # ------------------------------------------------------------------ hooks

    def attach(self) -> None:
        """Puts the hooks on the model."""
        hooks: dict[tuple[int, type[Boundary]], Boundary] = {}
        places: list[tuple[int, type[Boundary], int]] = [
            (layer.d, Enter, m) for m, layer in enumerate(self.plan.layers)
        ]
        for m, layer in enumerate(self.plan.layers):
            if m + 1 == len(self.plan.layers) or (self.settings.variant == "local" and m < self.settings.layers):
                places.append((layer.y, Leave, m))
        for place, kind, m in places:
            module = self.plan.order[place]
            hook = hooks.get((id(module), kind))
            if hook is None:
                hook = hooks[id(module), kind] = kind(self, len(hooks))
                if kind is Enter:
                    module.register_forward_pre_hook(hook)  # type: ignore[arg-type]
                else:
                    module.register_forward_hook(hook)  # type: ignore[arg-type]
            hook.at_call[sum(other is module for other in self.plan.order[: place + 1])] = m

    def detach(self, model: nn.Module) -> None:
        """Takes the hooks off."""
        take_off(model)

    def enter(self, m: int, d: Tensor) -> Tensor:
        """Layer m receives d."""
        run = self._running()
        if m == 0:
            self.check_input(d)
        if m == len(run.targets):
            run.targets.append(d)
            run.versions.append(version_of(d))
        return d.clone() if self._clone_d[m] else d

    def leave(self, m: int, y: Tensor) -> Tensor:
        """Layer m has given y."""
        run = self._running()
        last = m + 1 == len(self.plan.layers)
        if len(run.targets) != m + 1:
            return y  # `watching` says what is missing
        if self.settings.variant == "local" and not run.reconstruct and m < self.settings.layers:
            if self.reverses(m, run):
                self.check_unchanged(run, m)
                y, loss, report = self.reverse_one(m, y, run)
                run.found[m] = (loss, report)
                self._gather_again(loss, run, [m])
            self._copy_norms(m + 1)
        if last:
            if self.settings.variant == "full" and not run.reconstruct:
                for k in range(m + 1):
                    self.check_unchanged(run, k)
                run.sums = self.reverse_all(y, run)
                self._gather_again(run.sums[-1], run, range(m + 1))
            run.y = y
        return self.released(y) if last else y

    def check_input(self, d: Tensor) -> None:
        """Raises ValueError for what the first layer cannot be run backwards on."""
        op: Any = self.plan.layers[0].op
        check_received(self.plan.names[0], describe.tied_of(op).dims, d, op.weight)

    def _gather_again(self, sums: Tensor, run: Run, layers: Sequence[int]) -> None:
        """The reverse of these layers has just run; its backward will read their weights."""
        if self.shards is not None:
            operands = [self.operands(m, run) for m in layers]
            modules = [self.plan.layers[m].op for m in layers]
            if self.settings.variant == "full":  # locally, norms were copied
                modules += [module for m in layers for module in self._latents(m)]
            read = [t for own in operands for t in (own.weight, own.bias, *own.params)]
            self.shards.gather_again(sums, modules, read)

    def _copy_norms(self, m: int) -> None:
        """A local reverse of layer m will apply norms of the layer that has just run."""
        if self.shards is not None and m < self.settings.layers:
            self.shards.copy(m, self._params(m))

    def released(self, y: Tensor) -> Tensor:
        """The chain's output for the rest of the model, which may work on it in place."""
        return y.clone() if self._clone_y else y

    def _running(self) -> Run:
        if self.run is None:
            raise RuntimeError("a hook of racecar ran outside the wrapped model's forward")
        return self.run

    # ------------------------------------------------------------------ description

    def layers(self, run: Run | None = None) -> list[rk.Layer]:
        specs = self._specs()[0]
        if run is None or run.drawn is None:
            return specs
        return [replace(spec, compare=spec.compare and run.drawn.chooses(m)) for m, spec in enumerate(specs)]

    def _latents(self, m: int) -> tuple[nn.Module, ...]:
        """Modules that are applied to what comes back to layer m."""
        activation = self.settings.input_activation
        return self.plan.layers[m].latent if m or activation is None else (activation,)

    def _specs(self) -> tuple[list[rk.Layer], list[list[Latent | None]]]:
        """Every layer as a value, and its latent step by step; both depend on which norms are in training mode."""
        mode = tuple(module.training for layer in self.plan.layers for module in layer.latent)
        if mode not in self._described:
            self._described[mode] = self._describe()
        return self._described[mode]

    def _describe(self) -> tuple[list[rk.Layer], list[list[Latent | None]]]:
        specs, steps = [], []
        for m, layer in enumerate(self.plan.layers):
            own = [describe.latent_of(module, self.settings.norm) for module in self._latents(m)]
            steps.append(own)
            tied = describe.tied_of(layer.op)
            pre = describe.steps_of(layer.pre, tied.dims)
            latent = tuple(s for s in own if s is not None)
            specs.append(rk.Layer(tied, pre, latent, compare=m < self.settings.layers))
        return specs, steps

    def operands(self, m: int, run: Run) -> Operands:
        op: Any = self.plan.layers[m].op
        found = Operands(op.weight, op.bias, self._params(m))
        if self.shards is not None:
            return self.shards.whole(self.plan.names[m], m, found, self.settings.variant)
        return found

    def _params(self, m: int) -> list[Tensor | None]:
        own = zip(self._latents(m), self._specs()[1][m], strict=True)
        return [t for module, step in own for t in describe.latent_tensors(module, step)]


def _in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))
