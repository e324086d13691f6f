"""Runs the reverse pass beside a model's own forward.

The forward stays the model's own. Who watches it, `hooks.py` a chain and `graph/` any other model, says what every
layer received and gave; the engine calls the operators of `racecar_kernels`. All that belongs to one forward is in a
`Run`, so nothing of it outlives its graph but the results that the user reads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import racecar_kernels as rk
from racecar_kernels import loss_factor

from .plan import Plan
from .run import Known, Report, Result, Run
from .sampling import Sample, Sampler
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
    sample: Sample | None = None


class Operands(NamedTuple):
    """The tensors of one layer's reverse: those of the tied operation, and of the norms and activations behind it."""

    weight: Tensor
    bias: Tensor | None
    params: list[Tensor | None]


class Engine(ABC):
    """The reverse pass of one wrapped model.

    The settings of its norms and activations (slopes, eps) are read once; which of them are in training mode is read
    at every forward.
    """

    result: Result | None = None  # of the last forward

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings):
        self.base = type(model)
        self.plan, self.settings = plan, settings
        self.lam: list[float] = []
        self.positive = False
        self.lam_tensor = torch.zeros(settings.layers, dtype=torch.float64)
        self._last_weights: tuple[Any, Tensor] | None = None
        self._kept_factors: dict[tuple[Any, ...], Tensor] = {}
        self.sampler = None if settings.sample is None else Sampler(settings.sample, settings.layers)
        self.run: Run | None = None
        self.training: bool | None = None  # the mode of the model around this part, while that runs

    def set_result(self, value: Result | None) -> None:
        """A method, since torch.compile in PyTorch 2.11 writes past the setter of a property."""
        self.result = value

    def __getstate__(self) -> dict[str, Any]:
        left_behind = {"run": None, "result": None, "_last_weights": None}  # a copy starts without the original's graph
        return {**self.__dict__, **left_behind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def set_lam(self, lam: list[float]) -> None:
        """In place, and read as a tensor by the forward, so that torch.compile and CUDA graphs see every change."""
        self.lam, self.positive = lam, any(lam)
        with torch.inference_mode(False), torch.no_grad():
            self.lam_tensor.copy_(torch.tensor(lam, dtype=torch.float64))

    # ------------------------------------------------------------------ what the one who watches knows

    @abstractmethod
    def attach(self) -> None:
        """Puts on the model what watching it takes."""

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Takes it off."""

    @abstractmethod
    def watching(self, run: Run) -> AbstractContextManager[None]:
        """Watches the model's own forward, which runs inside."""

    @abstractmethod
    def layers(self, run: Run | None = None) -> list[rk.Layer]:
        """Every layer as the operators take it, m = 1 first; of a run, as its norms ran there."""

    @abstractmethod
    def operands(self, m: int, run: Run) -> Operands:
        """The tensors of layer m's reverse."""

    @abstractmethod
    def why_layer_by_layer(self, model: nn.Module) -> str | None:
        """Why forward and reverse do not run as one autograd node; None if they do."""

    def new_run(self, reconstruct: bool) -> Run:
        """What is to be filled by a forward."""
        return Run(reconstruct)

    def forward(self, model: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own forward, and the reverse pass beside it."""
        with self.recording() as run:
            out = own(*args, **kwargs)
        self.finish(run)
        return out

    def without_reverse(
        self, model: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The model's own forward alone."""
        self.idle(model)
        return own(*args, **kwargs)

    # ------------------------------------------------------------------ one forward

    def active(self, model: nn.Module) -> bool:
        """Nothing is computed in eval mode or while every λ is 0."""
        return self.positive and (model.training if self.training is None else self.training)

    @contextmanager
    def recording(self, *, reconstruct: bool = False) -> Iterator[Run]:
        """Watches the model's own forward, which runs inside."""
        if reconstruct and self.plan.obstacle is not None:
            raise ValueError(
                f"what comes back at the input needs a unique path from output to input, but {self.plan.obstacle}; "
                "wrap a chain inside the model to see what comes back to that"
            )
        self.run = run = self.new_run(reconstruct)
        if not reconstruct:
            self.draw(run)
        try:
            with self.watching(run):
                yield run
        finally:
            self.run = None

    def draw(self, run: Run) -> None:
        """Says what part of the reverse pass this forward runs."""
        if self.sampler is not None:
            run.drawn = self.sampler.draw()

    def reverses(self, m: int, run: Run) -> bool:
        """Whether this forward runs the local reverse of layer m."""
        return m < self.settings.layers and (run.drawn is None or run.drawn.chooses(m))

    def check_unchanged(self, run: Run, m: int) -> None:
        if version_of(run.targets[m]) != run.versions[m]:
            raise RuntimeError(
                f"what layer {self.plan.names[m]!r} received was modified by an inplace operation before its reverse "
                "could be compared with it; use the operation that is not in place"
            )

    def idle(self, model: nn.Module) -> None:
        """The result of a forward without a reverse pass."""
        device = next((p.device for p in model.parameters()), None)
        self.set_result(Result(torch.zeros((), device=device)))

    def finish(self, run: Run) -> None:
        """Σ λ_m · loss_m of the forward that has just run."""
        count = self.settings.layers
        whole = run.sums[0].dim() == 1  # all layers' sums in one tensor
        sums = run.sums[0] if whole else torch.stack(run.sums[:count])
        if sums.shape[0] > count:
            sums = sums[:count]
        factors = self._factors(run)
        weights = self._weights(factors, sums)
        if run.drawn is None:
            self.set_result(Result(torch.dot(sums, weights), sums.detach(), factors, weights, run.reports))
            return
        drawn, blocks = run.drawn, run.blocks
        chosen = [drawn.chooses(m) for m in range(count)]
        factors = [f * blocks.get(m, 1) for m, f in enumerate(factors)]
        times = [drawn.groups * blocks.get(m, 1) if chosen[m] else 0 for m in range(count)]
        weights = weights * torch.tensor(times, dtype=weights.dtype, device=weights.device)
        self.set_result(Result(torch.dot(sums, weights), sums.detach(), factors, weights, run.reports, chosen))

    def _factors(self, run: Run) -> list[float]:
        """What turns Σ(·)² into the loss of every compared layer."""
        count, reduction = self.settings.layers, self.settings.reduction
        if reduction != "mean":
            return [loss_factor(reduction, 1)] * count
        sizes = [math.prod(shape) for shape in run.shapes] or run.sizes
        sizes = sizes or [1 if t is None else t.numel() for t in run.targets]
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

    def reverse_one(
        self, m: int, y: Tensor, run: Run, *, seen_later: bool = True
    ) -> tuple[Tensor, Tensor, Report | None]:
        """Local: the reverse of layer m from what it gave.

        seen_later: the rest of the network goes on with what is returned; else a deferred reverse would never run.

        Returns:
            What the network goes on with, Σ (d - d')², and the report that it is found in where it is deferred.
        """
        segment = rk.Segment((self.layers(run)[m],), (), self.settings.backend)
        target, (weight, bias, params) = run.targets[m], self.operands(m, run)
        whole = y
        y, (target,) = self._part(y, [m], [target], run)
        seen_later = seen_later and y is whole
        # torch.compile traces no node of ours that waits for the backward; its loss is known after the forward instead
        waits = self.settings.memory == "deferred" and seen_later and not torch.compiler.is_compiling()
        if not waits:
            keep = self.settings.memory == "store"
            _, sums = rk.reverse_layers(segment, y, [target], [weight], [bias], params, keep=keep)
            return whole, sums[0], None
        report = rk.Report()
        y, zero = rk.deferred_layer(segment, y, target, weight, bias, params, report)
        return y, zero, report

    def gather(self, run: Run) -> None:
        """Sums and reports of all compared layers, m = 1 first; 0 of those that did not run."""
        some = next(iter(run.found.values()))[0] if run.found else run.targets[0].new_zeros((), dtype=torch.float32)
        zero = torch.zeros_like(some)
        found = [run.found.get(m, (zero, None)) for m in range(self.settings.layers)]
        run.sums = [loss for loss, _ in found]
        if any(report is not None for _, report in found):
            run.reports = [Known(loss.detach()) if report is None else report for loss, report in found]

    def reverse_all(self, y: Tensor, run: Run) -> list[Tensor]:
        """Full: from d_{n+1} down to d'_1. Returns the sums of squares of all layers in one tensor, m = 1 first."""
        specs = self.layers(run)
        n = len(specs)
        run.sizes = [t.numel() for t in run.targets]
        y, run.targets = self._part(y, list(range(n)), run.targets, run)
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

    def _part(self, y: Tensor, layers: list[int], targets: list[Any], run: Run) -> tuple[Tensor, list[Any]]:
        """The block of the batch that is drawn, of y and the d of these layers."""
        if run.drawn is None or run.drawn.blocks == 1:
            return y, targets
        for m, target in zip(layers, targets, strict=True):
            run.blocks[m] = run.drawn.blocks_of(target)
        return run.drawn.part(y), [run.drawn.part(target) for target in targets]

    def _reverse_segment(
        self, low: int, high: int, y: Tensor, run: Run, *, compare: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The reverse of layers low .. high-1, from the highest; y is what came back of the layer above, not undone."""
        specs = self.layers(run)
        chosen = range(high - 1, low - 1, -1)
        undo_first = specs[high].pre if high < (self.plan.chain or len(specs)) else ()
        layers = tuple(specs[m] if compare else replace(specs[m], compare=False) for m in chosen)
        segment = rk.Segment(layers, undo_first, self.settings.backend)
        operands = [self.operands(m, run) for m in chosen]
        return rk.reverse_layers(
            segment,
            y,
            [run.targets[m] for m in chosen],
            [own.weight for own in operands],
            [own.bias for own in operands],
            [t for own in operands for t in own.params],
            keep=self.settings.memory == "store",
        )

    def reconstruct(self, run: Run) -> Tensor:
        """d'_1 of a recorded forward."""
        if run.y is None:
            raise RuntimeError("no forward was recorded")
        a, _ = self._reverse_segment(0, self.plan.chain or len(self.plan.layers), run.y, run, compare=False)
        return rk.undo_steps(a, self.layers(run)[0].pre, tuple(run.targets[0].shape))

    def reverse_of(self, m: int, y: Tensor, run: Run) -> Tensor:
        """d'_m that comes back of layer m from y, without comparing it."""
        spec, (weight, bias, params) = replace(self.layers(run)[m], compare=False), self.operands(m, run)
        segment = rk.Segment((spec,), (), self.settings.backend)
        a, _ = rk.reverse_layers(segment, y, [run.targets[m]], [weight], [bias], params, keep=False)
        return rk.undo_steps(a, spec.pre, tuple(run.targets[m].shape))


def check_received(name: str, dims: int, d: Tensor, weight: Tensor) -> None:
    """Raises ValueError for a first input that the reverse pass cannot work on."""
    if d.device != weight.device:
        raise ValueError(
            f"layer {name!r} received a tensor on {d.device}, its weight is on {weight.device}; move the model or its "
            "input, so that both are on one device"
        )
    if dims and d.dim() != dims + 2:
        raise ValueError(
            f"the reverse pass needs batches, (batch, channels, {dims} spatial sizes) here; layer {name!r} received "
            f"{tuple(d.shape)}; add a dimension with x.unsqueeze(0)"
        )
    if d.numel() == 0:
        raise ValueError(f"the reverse pass needs a batch of at least one; layer {name!r} received {tuple(d.shape)}")


def version_of(d: Tensor) -> int:
    """How often d was modified in place; inference mode does not count that, and torch.compile does not trace it."""
    return 0 if torch.compiler.is_compiling() or d.is_inference() else d._version
