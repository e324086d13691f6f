"""Runs the reverse pass beside a model's own forward.

Hooks stand where a layer receives its input and where the last one gives its output. They see d_1 .. d_{n+1} go by, and
call the operators of `racecar_kernels`; the forward stays the model's own. All that belongs to one forward is in a
`_Run`, so nothing of it outlives its graph but the results that the user reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import racecar_kernels as rk
from racecar_kernels import describe, undo
from racecar_kernels.functional import loss_factor
from racecar_kernels.layer import Latent

from .plan import Plan
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


@dataclass
class _Run:
    """One forward under way: what the hooks have seen so far."""

    reconstruct: bool = False
    targets: list[Tensor] = field(default_factory=list)
    y: Tensor | None = None
    sums: list[Tensor] = field(default_factory=list)
    reports: list[rk.Report] = field(default_factory=list)
    calls: dict[int, int] = field(default_factory=dict)


@dataclass
class Result:
    """What the user reads of the last forward; `sums` and `weights` have one entry per compared layer, m = 1 first."""

    total: Tensor
    sums: Tensor | None = None
    factors: Tensor | None = None
    weights: Tensor | None = None
    reports: list[rk.Report] = field(default_factory=list)

    def known_sums(self) -> Tensor | None:
        """Σ(·)² of every compared layer; None while a deferred backward has not run."""
        if not self.reports:
            return self.sums
        losses = [report.loss for report in self.reports]
        return None if any(v is None for v in losses) else torch.stack([v for v in losses if v is not None])


class Boundary:
    """A hook of ours. Its module may be used several times: `at_call` says at which call which layer begins or ends."""

    def __init__(self, engine: Engine, index: int):
        self.engine, self.index = engine, index
        self.at_call: dict[int, int] = {}

    def layer(self) -> int | None:
        run = self.engine.run
        if run is None:
            return None
        run.calls[self.index] = call = run.calls.get(self.index, 0) + 1
        return self.at_call.get(call)


class Enter(Boundary):
    """Before the first module of a layer: its input is d."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        m = self.layer()
        return None if m is None else (self.engine.enter(m, args[0], module), *args[1:])


class Leave(Boundary):
    """Behind the last module of the last layer: its output is d_{n+1}."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self.layer() is None else self.engine.leave(output)


class Engine:
    """The reverse pass of one wrapped model."""

    def __init__(self, plan: Plan, settings: Settings):
        self.plan, self.settings = plan, settings
        self.lam: list[float] = []
        self.run: _Run | None = None
        self.result: Result | None = None
        self._cached: tuple[Any, Tensor, Tensor] | None = None
        self._described: dict[tuple[bool, ...], tuple[list[rk.Layer], list[list[Latent | None]]]] = {}
        after = plan.layers[-1].last + 1
        self._clone_output = after < len(plan.order) and _in_place(plan.order[after])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "run": None, "result": None}  # a copy starts without the original's graph

    # ------------------------------------------------------------------ hooks

    def attach(self) -> None:
        """Puts the hooks on the model."""
        hooks: dict[tuple[int, type[Boundary]], Boundary] = {}
        places = [(layer.first, Enter, m) for m, layer in enumerate(self.plan.layers)]
        places.append((self.plan.layers[-1].last, Leave, len(self.plan.layers) - 1))  # type: ignore[arg-type]
        for place, kind, m in places:
            module = self.plan.order[place]
            hook = hooks.get((id(module), kind))
            if hook is None:
                hook = hooks[id(module), kind] = kind(self, len(hooks))
                if kind is Enter:
                    module.register_forward_pre_hook(hook)
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

    def enter(self, m: int, d: Tensor, module: nn.Module) -> Tensor:
        """Layer m receives d; the layer below has given it."""
        run = self._running()
        if m and self._local(run):
            d = self._reverse_one(m - 1, d, run)
        run.targets.append(d)
        return d.clone() if _in_place(module) else d

    def leave(self, y: Tensor) -> Tensor:
        """The last layer has given y."""
        run = self._running()
        if len(run.targets) != len(self.plan.layers):
            return y  # `recording` says what is missing
        if self._local(run):
            y = self._reverse_one(len(self.plan.layers) - 1, y, run)
        elif not run.reconstruct:
            run.sums = self._reverse_all(y, run)
        run.y = y
        return y.clone() if self._clone_output else y

    def _running(self) -> _Run:
        if self.run is None:
            raise RuntimeError("a hook of racecar ran outside the wrapped model's forward")
        return self.run

    def _local(self, run: _Run) -> bool:
        return self.settings.variant == "local" and not run.reconstruct

    # ------------------------------------------------------------------ one forward

    def active(self, model: nn.Module) -> bool:
        """Nothing is computed in eval mode or while every λ is 0."""
        return model.training and any(self.lam)

    @contextmanager
    def recording(self, *, reconstruct: bool = False) -> Iterator[_Run]:
        """Lets the hooks work while the model's own forward runs."""
        self.run = run = _Run(reconstruct)
        try:
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

    def finish(self, run: _Run) -> None:
        """Σ λ_m · loss_m of the forward that has just run."""
        count = self.settings.layers
        sums = run.sums[0][:count] if self.settings.variant == "full" else torch.stack(run.sums[:count])
        factors, weights = self._weights(tuple([t.numel() for t in run.targets[:count]]), sums)
        self.result = Result((sums * weights).sum(), sums.detach(), factors, weights, run.reports)

    def _weights(self, elements: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """What turns Σ(·)² of every compared layer into its loss, and that times λ."""
        factors = [loss_factor(self.settings.reduction, n) for n in elements]
        world = self._processes()
        key = (tuple(self.lam), tuple(factors), world, like.dtype, like.device)
        if self._cached is not None and self._cached[0] == key and not torch.compiler.is_compiling():
            return self._cached[1:]
        scale = torch.tensor(factors, dtype=like.dtype, device=like.device)
        weights = torch.tensor(self.lam, dtype=like.dtype, device=like.device) * scale * world
        if not torch.compiler.is_compiling():
            self._cached = (key, scale, weights)
        return scale, weights

    def _processes(self) -> int:
        """`l2` and `sum` refer to the whole batch, while data-parallel training averages over the processes."""
        distributed = torch.distributed
        if self.settings.reduction == "mean" or not distributed.is_available() or not distributed.is_initialized():
            return 1
        return distributed.get_world_size()

    # ------------------------------------------------------------------ reverse

    def _reverse_one(self, m: int, y: Tensor, run: _Run) -> Tensor:
        """Local: the reverse of layer m from what it gave. Returns what the rest of the network goes on with."""
        if m >= self.settings.layers:
            return y
        specs, _ = self._specs()
        segment = rk.Segment((specs[m],), (), self.settings.backend)
        op, target, params = self.plan.layers[m].op, run.targets[m], self._params(m)
        if self.settings.memory != "deferred":
            keep = self.settings.memory == "store"
            _, sums = rk.reverse_layers(segment, y, [target], [op.weight], [op.bias], params, keep=keep)
            run.sums.append(sums[0])
            return y
        report = rk.Report()
        y, zero = rk.deferred_layer(segment, y, target, op.weight, op.bias, params, report)
        run.sums.append(zero)
        run.reports.append(report)
        return y

    def _reverse_all(self, y: Tensor, run: _Run) -> list[Tensor]:
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

    def _reverse_segment(self, low: int, high: int, y: Tensor, run: _Run) -> tuple[Tensor, Tensor]:
        """The reverse of layers low .. high-1, from the highest; y is what came back of the layer above, not undone."""
        specs, _ = self._specs()
        chosen = range(high - 1, low - 1, -1)
        undo_first = specs[high].pre if high < len(specs) else ()
        segment = rk.Segment(tuple(specs[m] for m in chosen), undo_first, self.settings.backend)
        ops = [self.plan.layers[m].op for m in chosen]
        params = [t for m in chosen for t in self._params(m)]
        return rk.reverse_layers(
            segment,
            y,
            [run.targets[m] for m in chosen],
            [op.weight for op in ops],
            [op.bias for op in ops],
            params,
            keep=self.settings.memory == "store",
        )

    def reconstruct(self, run: _Run) -> Tensor:
        """d'_1 of a recorded forward."""
        if run.y is None:
            raise RuntimeError("no forward was recorded")
        a, _ = self._reverse_segment(0, len(self.plan.layers), run.y, run)
        return undo.apply(a, self._specs()[0][0].pre, tuple(run.targets[0].shape))

    # ------------------------------------------------------------------ description

    def layers(self) -> list[rk.Layer]:
        """Every layer as the operators take it, m = 1 first."""
        return self._specs()[0]

    def _latents(self, m: int) -> tuple[nn.Module, ...]:
        """Modules that the reverse of layer m ends with: the latent of the layer below."""
        if m:
            return self.plan.layers[m - 1].latent
        activation = self.settings.input_activation
        return () if activation is None else (activation,)

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

    def _params(self, m: int) -> list[Tensor | None]:
        steps = self._specs()[1][m]
        modules = self._latents(m)
        return [t for mod, step in zip(modules, steps, strict=True) for t in describe.latent_tensors(mod, step)]


def _in_place(module: nn.Module) -> bool:
    return bool(getattr(module, "inplace", False))
