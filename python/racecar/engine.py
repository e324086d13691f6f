"""Runs the reverse pass beside a model's own forward.

Hooks stand where a layer receives its input and where the last one gives its output. They see d_1 .. d_{n+1} go by, and
call the operators of `racecar_kernels`; the forward stays the model's own. All that belongs to one forward is in a
`Run`, so nothing of it outlives its graph but the results that the user reads.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import racecar_kernels as rk
from racecar_kernels import Latent, describe, loss_factor

from .chained import Chained
from .plan import Plan
from .run import Result, Run
from .segments import split


@dataclass
class Settings:
    """The arguments of `racecar.wrap`, checked."""

    variant: str
    layers: int
    reduction: str
    norm: str
    memory: str
    input_activation: nn.Module | None
    backend: str | None


class Boundary:
    """A hook of ours. Its module may be used several times: `at_call` says at which call which layer begins or ends.

    It does not own the engine: the model does, and would otherwise be kept alive by its own modules' hooks.
    """

    def __init__(self, engine: Engine | None = None, index: int = 0):
        self._engine = None if engine is None else weakref.ref(engine)
        self.index = index
        self.at_call: dict[int, int] = {}

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy does nothing until the copied engine puts its own hooks on

    def engine_and_layer(self) -> tuple[Engine | None, int | None]:
        engine = None if self._engine is None else self._engine()
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


class Engine:
    """The reverse pass of one wrapped model.

    The settings of its norms and activations (slopes, eps) are read once; which of them are in training mode is read
    at every forward.
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings):
        self.base = type(model)
        self.plan, self.settings = plan, settings
        self.lam: list[float] = []
        self.positive = False
        self.lam_tensor = torch.zeros(settings.layers, dtype=torch.float64)
        self._last_weights: tuple[Any, Tensor] | None = None
        self._kept_factors: dict[tuple[Any, ...], Tensor] = {}
        self.run: Run | None = None
        self.result: Result | None = None
        self.chained = Chained(self, model)
        self._described: dict[tuple[bool, ...], tuple[list[rk.Layer], list[list[Latent | None]]]] = {}
        self._clone_d = [any(map(_in_place, layer.pre)) for layer in plan.layers]
        inside = {id(module) for module in plan.order}
        self._clone_y = any(_in_place(module) and id(module) not in inside for module in model.modules()) or any(
            map(_in_place, plan.order[plan.layers[-1].y + 1 :])
        )

    def __getstate__(self) -> dict[str, Any]:
        left_behind = {"run": None, "result": None, "_last_weights": None}  # a copy starts without the original's graph
        return {**self.__dict__, **left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for module in self.plan.order:
            self.detach(module)
        self.attach()

    def set_lam(self, lam: list[float]) -> None:
        """In place, and read as a tensor by the forward, so that torch.compile and CUDA graphs see every change."""
        self.lam, self.positive = lam, any(lam)
        with torch.inference_mode(False), torch.no_grad():
            self.lam_tensor.copy_(torch.tensor(lam, dtype=torch.float64))

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

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Takes the hooks off."""
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [k for k, hook in hooks.items() if isinstance(hook, Boundary)]:
                    del hooks[key]

    def enter(self, m: int, d: Tensor) -> Tensor:
        """Layer m receives d."""
        run = self._running()
        if m == 0:
            self.check_input(d)
        if m == len(run.targets):
            run.targets.append(d)
            run.versions.append(_version(d))
        return d.clone() if self._clone_d[m] else d

    def leave(self, m: int, y: Tensor) -> Tensor:
        """Layer m has given y."""
        run = self._running()
        last = m + 1 == len(self.plan.layers)
        if len(run.targets) != m + 1:
            return y  # `recording` says what is missing
        if self.settings.variant == "local" and not run.reconstruct and m < self.settings.layers:
            self._check_unchanged(run, m)
            y = self._reverse_one(m, y, run)
        if last:
            if self.settings.variant == "full" and not run.reconstruct:
                for k in range(m + 1):
                    self._check_unchanged(run, k)
                run.sums = self._reverse_all(y, run)
            run.y = y
        return self.released(y) if last else y

    def released(self, y: Tensor) -> Tensor:
        """The chain's output for the rest of the model, which may work on it in place."""
        return y.clone() if self._clone_y else y

    def _running(self) -> Run:
        if self.run is None:
            raise RuntimeError("a hook of racecar ran outside the wrapped model's forward")
        return self.run

    def check_input(self, d: Tensor) -> None:
        op = self.plan.layers[0].op
        dims, device = describe.tied_of(op).dims, op.weight.device
        if d.device != device:
            raise ValueError(
                f"layer {self.plan.names[0]!r} received a tensor on {d.device}, its weight is on {device}; move the "
                "model or its input, so that both are on one device"
            )
        if dims and d.dim() != dims + 2:
            raise ValueError(
                f"the reverse pass needs batches, (batch, channels, {dims} spatial sizes) here; layer "
                f"{self.plan.names[0]!r} received {tuple(d.shape)}; add a dimension with x.unsqueeze(0)"
            )
        if d.numel() == 0:
            raise ValueError(
                f"the reverse pass needs a batch of at least one; layer {self.plan.names[0]!r} received "
                f"{tuple(d.shape)}"
            )

    def _check_unchanged(self, run: Run, m: int) -> None:
        if _version(run.targets[m]) != run.versions[m]:
            raise RuntimeError(
                f"what layer {self.plan.names[m]!r} received was modified by an inplace operation before its reverse "
                "could be compared with it; use the operation that is not in place"
            )

    # ------------------------------------------------------------------ one forward

    def active(self, model: nn.Module) -> bool:
        """Nothing is computed in eval mode or while every λ is 0."""
        return model.training and self.positive

    @contextmanager
    def recording(self, *, reconstruct: bool = False) -> Iterator[Run]:
        """Lets the hooks work while the model's own forward runs."""
        self.run = run = Run(reconstruct)
        # a parametrised weight is computed once for forward and reverse
        parametrised = any("parametrizations" in layer.op._modules for layer in self.plan.layers)
        try:
            with parametrize.cached() if parametrised else nullcontext():
                yield run
        finally:
            self.run = None
        if len(run.targets) != len(self.plan.layers) or run.y is None:
            raise RuntimeError(
                f"the forward ran {len(run.targets)} of the {len(self.plan.layers)} planned layers "
                f"({', '.join(self.plan.names)}); unwrap and wrap again after changing the model"
            )

    def idle(self, model: nn.Module) -> None:
        """The result of a forward without a reverse pass."""
        device = next((p.device for p in model.parameters()), None)
        self.result = Result(torch.zeros((), device=device))

    def finish(self, run: Run) -> None:
        """Σ λ_m · loss_m of the forward that has just run."""
        count = self.settings.layers
        whole = run.sums[0].dim() == 1  # all layers' sums in one tensor
        sums = run.sums[0] if whole else torch.stack(run.sums[:count])
        if sums.shape[0] > count:
            sums = sums[:count]
        factors = self._factors(run)
        weights = self._weights(factors, sums)
        self.result = Result(torch.dot(sums, weights), sums.detach(), factors, weights, run.reports)

    def _factors(self, run: Run) -> list[float]:
        """What turns Σ(·)² into the loss of every compared layer."""
        count, reduction = self.settings.layers, self.settings.reduction
        if reduction != "mean":
            return [loss_factor(reduction, 1)] * count
        sizes = [math.prod(shape) for shape in run.shapes] or [t.numel() for t in run.targets]
        return [loss_factor(reduction, size) for size in sizes[:count]]

    def _weights(self, factors: list[float], like: Tensor) -> Tensor:
        """λ_m times what turns Σ(·)² into the loss of layer m."""
        if self.lam_tensor.device != like.device:
            with torch.inference_mode(False):
                self.lam_tensor = self.lam_tensor.to(like.dtype).to(like.device)  # not every device knows float64
            self._last_weights = None
        if torch.compiler.is_compiling() or not like.is_cpu:  # a graph that is captured has to read λ every time
            return self._weighted(factors, like)
        key = (self.lam_tensor._version, like.dtype, factors, self._processes())
        if self._last_weights is None or self._last_weights[0] != key:
            with torch.inference_mode(False):
                self._last_weights = key, self._weighted(factors, like)
        return self._last_weights[1]

    def _weighted(self, factors: list[float], like: Tensor) -> Tensor:
        lam = self.lam_tensor.to(like.dtype)
        if self.settings.reduction != "mean":
            return lam * (factors[0] * self._processes())
        if torch.compiler.is_compiling():
            return lam * torch.tensor(factors, dtype=like.dtype, device=like.device)
        key = (tuple(factors), like.dtype, like.device)
        if key not in self._kept_factors:  # a copy to the device waits for it, and a CUDA graph takes none
            with torch.inference_mode(False):
                self._kept_factors[key] = torch.tensor(factors, dtype=like.dtype, device=like.device)
        return lam * self._kept_factors[key]

    def _processes(self) -> int:
        """`l2` and `sum` refer to the whole batch, while data-parallel training averages over the processes."""
        distributed = torch.distributed
        if self.settings.reduction == "mean" or not distributed.is_available() or not distributed.is_initialized():
            return 1
        return distributed.get_world_size()

    # ------------------------------------------------------------------ reverse

    def _reverse_one(self, m: int, y: Tensor, run: Run) -> Tensor:
        """Local: the reverse of layer m from what it gave. Returns what the rest of the network goes on with."""
        specs, _ = self._specs()
        segment = rk.Segment((specs[m],), (), self.settings.backend)
        op, target, params = self.plan.layers[m].op, run.targets[m], self.params_of(m)
        if self.settings.memory != "deferred":
            keep = self.settings.memory == "store"
            _, sums = rk.reverse_layers(segment, y, [target], [op.weight], [op.bias], params, keep=keep)
            run.sums.append(sums[0])
            return y
        report = rk.Report()
        y, zero = rk.deferred_layer(segment, y, target, op.weight, op.bias, params, report)
        run.sums.append(zero)
        run.reports = [*run.reports, report]
        return y

    def _reverse_all(self, y: Tensor, run: Run) -> list[Tensor]:
        """Full: from d_{n+1} down to d'_1. Returns the sums of squares of all layers in one tensor, m = 1 first."""
        specs, _ = self._specs()
        n = len(specs)
        lengths = [n]
        if self.settings.memory == "recompute":
            shapes = [spec.input_shape(tuple(t.shape)) for spec, t in zip(specs, run.targets, strict=True)]
            lengths = split(tuple(torch.Size(shape).numel() for shape in reversed(shapes)))
        sums: list[Tensor] = []
        above = n
        for length in lengths:
            y, part = self._reverse_segment(above - length, above, y, run)
            above -= length
            sums.append(part)
        return [(torch.cat(sums) if len(sums) > 1 else sums[0]).flip(0)]

    def _reverse_segment(
        self, low: int, high: int, y: Tensor, run: Run, *, compare: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The reverse of layers low .. high-1, from the highest; y is what came back of the layer above, not undone."""
        specs, _ = self._specs()
        chosen = range(high - 1, low - 1, -1)
        undo_first = specs[high].pre if high < len(specs) else ()
        layers = tuple(specs[m] if compare else replace(specs[m], compare=False) for m in chosen)
        segment = rk.Segment(layers, undo_first, self.settings.backend)
        ops = [self.plan.layers[m].op for m in chosen]
        params = [t for m in chosen for t in self.params_of(m)]
        return rk.reverse_layers(
            segment,
            y,
            [run.targets[m] for m in chosen],
            [op.weight for op in ops],
            [op.bias for op in ops],
            params,
            keep=self.settings.memory == "store",
        )

    def reconstruct(self, run: Run) -> Tensor:
        """d'_1 of a recorded forward."""
        if run.y is None:
            raise RuntimeError("no forward was recorded")
        a, _ = self._reverse_segment(0, len(self.plan.layers), run.y, run, compare=False)
        return rk.undo_steps(a, self._specs()[0][0].pre, tuple(run.targets[0].shape))

    def reverse_of(self, m: int, y: Tensor, run: Run) -> Tensor:
        """d'_m that comes back of layer m from y, without comparing it."""
        spec, op = replace(self._specs()[0][m], compare=False), self.plan.layers[m].op
        segment = rk.Segment((spec,), (), self.settings.backend)
        a, _ = rk.reverse_layers(segment, y, [run.targets[m]], [op.weight], [op.bias], self.params_of(m), keep=False)
        return rk.undo_steps(a, spec.pre, tuple(run.targets[m].shape))

    # ------------------------------------------------------------------ description

    def layers(self) -> list[rk.Layer]:
        """Every layer as the operators take it, m = 1 first."""
        return self._specs()[0]

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

    def params_of(self, m: int) -> list[Tensor | None]:
        steps = self._specs()[1][m]
        modules = self._latents(m)
        return [t for mod, step in zip(modules, steps, strict=True) for t in describe.latent_tensors(mod, step)]


def _in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))


def _version(d: Tensor) -> int:
    """How often d was modified in place; inference mode does not count that, and torch.compile does not trace it."""
    return 0 if torch.compiler.is_compiling() or d.is_inference() else d._version
