"""Runs the covered chain of a wrapped model as one autograd node, forward and reverse together.

It gives what the model's own forward and the hooks of `hooks.py` give, and keeps less. It needs to know every module
in the chain and that nobody watches them; where that does not hold, the hooks do the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import racecar_kernels as rk
from racecar_kernels import describe

from .plan import leaves

if TYPE_CHECKING:
    from .hooks import ChainEngine
    from .run import Run

_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


@dataclass(frozen=True)
class Prepared:
    """The chain as the operator takes it, for one choice of norms in training mode.

    `latents`: for every layer its norms and activations with their descriptions, as they follow its operation.
    """

    chain: rk.Chain
    text: str
    latents: list[list[tuple[nn.Module, rk.Latent | None]]]
    without_tensors: bool

    def params(self) -> list[Tensor | None]:
        """The tensors of all latents; running statistics as they are now."""
        if self.without_tensors:
            return []
        return [t for own in self.latents for module, step in own for t in describe.latent_tensors(module, step)]


class Chained:
    """The modules in front of the chain, the chain, and those behind it.

    What does not change from step to step is looked at once. Every forward still sees a module that was added, taken
    away or given a hook since, and a parameter that was replaced.

    Attributes:
        obstacle: why this model's chain never runs as one node; None if it can.
    """

    def __init__(self, engine: ChainEngine, model: nn.Module) -> None:
        from .hooks import Boundary

        order, first, last = engine.plan.order, engine.plan.layers[0], engine.plan.layers[-1]
        run = [module for _, module in leaves(model)]
        self.modules, self.boundary = run, Boundary
        self.front, self.inside, self.behind = run[: first.d], run[first.d : last.y + 1], run[last.y + 1 :]
        self.last = order[last.d + len(last.pre) + 1 : last.y + 1]
        self.ops = [layer.op for layer in engine.plan.layers]
        self.flat = describe.tied_of(self.ops[0]).dims == 0
        containers = [module for module in model.modules() if module is not model and list(module.children())]
        self.watched = [*containers, *self.inside]
        self.children = [(module, type(module), [*module._modules.values()]) for module in containers]
        self.top = [*model._modules.values()]
        unruly = (*describe.DROPOUTS, nn.modules.batchnorm._NormBase)
        self.unruly = [module for module in self.inside if isinstance(module, unruly)]
        self.latents = [*(layer.latent for layer in engine.plan.layers[1:]), self.last]
        self._norms = [module for own in self.latents for module in own if describe.is_a(module, describe.NORMS)]
        self._prepared: dict[tuple[Any, ...], Prepared] = {}
        self.obstacle = self._why_never(engine)

    def _why_never(self, engine: ChainEngine) -> str | None:
        for layer in engine.plan.layers:
            steps = describe.steps_of(layer.pre, describe.tied_of(layer.op).dims)
            if any(isinstance(step, rk.Pool) and step.mode == "other" for step in steps):
                return f"the average pooling in front of {layer.name!r} counts in its own way"
            if "parametrizations" in layer.op._modules:
                return f"the weight of {layer.name!r} is parametrised"
        return None

    def why_not(
        self, engine: ChainEngine, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Why this forward cannot run as one node; None if it can."""
        if len(args) != 1 or kwargs or type(args[0]) not in (Tensor, nn.Parameter) or args[0].is_inference():
            return "the input is not one plain tensor"
        if torch._C._are_functorch_transforms_active():
            return "the forward is being transformed"
        if args[0].device.type == "meta":  # autocast does not know it
            return "the input holds no numbers"
        if torch.is_autocast_enabled(args[0].device.type):
            return "autocast is on"
        return self.why_not_model(engine, model)

    def why_not_model(self, engine: ChainEngine, model: nn.Module) -> str | None:
        """Why the model as it is now cannot run as one node, whatever its input; None if it can."""
        if self.obstacle is not None:
            return self.obstacle
        if engine.settings.sample is not None and engine.settings.sample.batch > 1:
            return "the reverse runs on a part of the batch"
        if not self._same_children(model) and any(
            a is not b for a, (_, b) in zip_longest(self.modules, leaves(model), fillvalue=("", None))
        ):
            return "the model was changed after wrapping"
        if any(getattr(global_hooks, name) for name in _GLOBAL):
            return "there are global module hooks"
        for module in self.watched:
            if self._watched(module):
                return f"a {type(module).__name__} in it has hooks"
        for module in self.unruly:
            if module.training and self._random_or_odd(module, engine):
                return f"a {type(module).__name__} in it does more than its reverse knows"
        return None

    def _same_children(self, model: nn.Module) -> bool:
        """Whether no module was added, replaced or taken away; a quick look, which may also say no for nothing."""
        if [*model._modules.values()] != self.top:
            return False
        return all(type(module) is kind and [*module._modules.values()] == own for module, kind, own in self.children)

    def _watched(self, module: nn.Module) -> bool:
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        ):
            for hook in hooks.values():
                if not isinstance(hook, self.boundary):
                    return True
        return False

    @staticmethod
    def _random_or_odd(module: nn.Module, engine: ChainEngine) -> bool:
        m: Any = module
        if describe.is_a(module, describe.DROPOUTS):
            return bool(m.p)
        if not isinstance(module, nn.modules.batchnorm._NormBase) or m.running_mean is None:
            return False
        return engine.settings.norm == "running" or isinstance(module, nn.modules.instancenorm._InstanceNorm)

    # ------------------------------------------------------------------ one forward

    def forward(self, engine: ChainEngine, run: Run, x: Tensor) -> Tensor:
        """The model's output; `run` then holds what the hooks would have left there."""
        for module in self.front:
            x = module(x)
        if not self.flat or x.numel() == 0:
            engine.check_input(x)
        settings, prepared, report = engine.settings, self._prepare(engine, run), rk.ChainReport()
        weights = [_parameter(op, "weight") for op in self.ops]
        biases = [_parameter(op, "bias") for op in self.ops]
        y, sums = rk.run_chain(
            prepared.chain, prepared.text, x, weights, biases, prepared.params(), memory=settings.memory, report=report
        )
        run.sums = [sums]
        if report.stats or settings.reduction == "mean":
            run.shapes = self._shapes(prepared.chain, x, weights)
            self._update_statistics(prepared, report.stats, run.shapes[1:])
        if settings.memory == "deferred":
            run.reports = [PartOfReport(report, m) for m in range(settings.layers)]
        y = engine.released(y)
        for module in self.behind:
            y = module(y)
        return y

    def _prepare(self, engine: ChainEngine, run: Run) -> Prepared:
        """The chain's description; it depends on which norms are in training mode, and which layers are drawn."""
        mode = (*[module.training for module in self._norms], None if run.drawn is None else run.drawn.group)
        if mode not in self._prepared:
            norm, settings = engine.settings.norm, engine.settings
            latents = [[(module, describe.latent_of(module, norm)) for module in own] for own in self.latents]
            last = tuple(step for _, step in latents[-1] if step is not None)
            chain = rk.Chain(tuple(engine.layers(run)), last, settings.variant == "full", settings.backend)
            self._prepared[mode] = Prepared(chain, str(chain), latents, chain.tensors == 0)
        return self._prepared[mode]

    @staticmethod
    def _shapes(chain: rk.Chain, x: Tensor, weights: list[Any]) -> list[tuple[int, ...]]:
        """Those of d_1 .. d_{n+1}."""
        shapes = [tuple(x.shape)]
        for layer, weight in zip(chain.layers, weights, strict=True):
            shapes.append(layer.output_shape(shapes[-1], tuple(weight.shape)))
        return shapes

    def _update_statistics(self, prepared: Prepared, stats: list[Tensor], shapes: list[tuple[int, ...]]) -> None:
        """Running means and variances, as the norms' own forward would have left them."""
        found = iter(stats)
        for own, shape in zip(prepared.latents, shapes, strict=True):
            for module, step in own:
                if not (isinstance(step, rk.Norm) and step.kind == "batch" and not step.running):
                    continue
                mean, rstd = next(found), next(found)
                if math.prod(shape) == shape[1]:
                    raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
                if module.training and module.running_mean is not None:
                    update_running(module, mean, rstd, math.prod(shape) // shape[1])


def _parameter(op: nn.Module, name: str) -> Any:
    """op.weight or op.bias, without the detour over nn.Module.__getattr__; a parametrised one is computed."""
    own = op._parameters
    return own[name] if name in own else getattr(op, name)


@torch.no_grad()
def update_running(norm: Any, mean: Tensor, rstd: Tensor, count: int) -> None:
    """What a batch norm in training does to its buffers, from 1/deviation = (variance + eps)^(-1/2)."""
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    variance = (rstd.double().pow(-2) - norm.eps).clamp_min_(0)
    unbiased = variance * (count / (count - 1)) if count > 1 else variance
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), factor)


class PartOfReport:
    """The report of one layer of a deferred chain."""

    def __init__(self, report: rk.ChainReport, m: int) -> None:
        self.report, self.m = report, m

    @property
    def ran(self) -> bool:
        """Whether a backward pass has found the loss."""
        return self.report.losses is not None

    @property
    def loss(self) -> Tensor | None:
        """Σ (d - d')², once it is known."""
        return None if self.report.losses is None else self.report.losses[self.m]
