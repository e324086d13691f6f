"""The reverse pass of a model of any form, layer by layer as its forward runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import racecar_kernels as rk
from racecar_kernels import Activation, Norm, describe

from .. import checkpointing, sharding
from ..engine import Engine, Operands, Settings, check_received, version_of
from ..hooks import take_off
from ..plan import Plan
from ..run import Run
from .plan import GraphLayer, described_latent
from .watch import UNSEEN, Notice, Seen, Watch, remedy


@dataclass
class GraphRun(Run):
    """One forward under way: by layer, what was seen of it.

    `watched`: layer, 0 for d or 1 for y, the tensor, and its version; of layers that run for the first time.
    `outside`: under what the forward began.
    """

    seen: dict[int, Seen] = field(default_factory=dict)
    watch: Watch | None = None
    watched: list[tuple[int, int, Tensor, int]] = field(default_factory=list)
    outside: checkpointing.Surroundings = field(default_factory=checkpointing.surroundings)


class GraphEngine(Engine):
    """The reverse pass of a graph; see `watch.py` for how its layers are seen.

    Attributes:
        weights: for every weight one of its layers, and which layer each use of it is.
        copies: of every layer, whether the network changes d, and y, in place later on. A layer's first forward shows
            it, with copies of both; no plan could, since what shares memory is only known when it runs.
    """

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings):
        super().__init__(model, plan, settings)
        self.weights: list[tuple[GraphLayer, dict[int, int]]] = []
        for m in range(len(plan.layers)):
            layer = self.layer(m)
            for other, uses in self.weights:
                if other.owner is layer.owner and other.attribute == layer.attribute:
                    uses[layer.use] = m
                    break
            else:
                self.weights.append((layer, {layer.use: m}))
        self.copies: dict[int, tuple[bool | None, bool | None]] = {}
        self._unseen = [module for module in model.modules() if isinstance(module, UNSEEN)]
        self._parametrised = any("parametrizations" in layer.owner._modules for layer, _ in self.weights)
        self.shards: sharding.Shards | None = None
        self._described: dict[tuple[int, tuple[bool, ...]], tuple[rk.Layer, list[rk.Latent]]] = {}

    def layer(self, m: int) -> GraphLayer:
        """What was planned of layer m."""
        layer = self.plan.layers[m]
        if not isinstance(layer, GraphLayer):
            raise TypeError(f"layer {layer.name!r} was planned for a chain")
        return layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for module in self._unseen:
            self.detach(module)
        self.attach()

    def attach(self) -> None:
        """Puts hooks on the few modules that a mode does not see under torch.compile."""
        for module in self._unseen:
            module.register_forward_hook(Notice(self))

    def detach(self, model: nn.Module) -> None:
        take_off(model)

    def why_layer_by_layer(self, model: nn.Module) -> str | None:
        return f"{self.base.__name__} is no chain of modules"

    def new_run(self, reconstruct: bool) -> Run:
        return GraphRun(reconstruct)

    def forward(self, model: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.shards = sharding.shards_of(model)
        try:
            return super().forward(model, own, args, kwargs)
        finally:
            self.shards = None

    @contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        if not isinstance(run, GraphRun):
            raise TypeError(f"a graph needs a run of its own, got {type(run).__name__}")
        count = len(self.plan.layers)
        run.targets, run.versions = [None] * count, [0] * count
        if run.reconstruct:
            sharding.check_whole(layer.owner for layer, _ in self.weights)
        run.watch = Watch(self, run)
        with parametrize.cached() if self._parametrised else nullcontext(), run.watch:
            yield
        self._check_complete(run)
        self._learn(run)
        if self.settings.variant == "local" and not run.reconstruct:
            self.gather(run)

    # ------------------------------------------------------------------ one layer

    def entered(self, m: int, d: Tensor, seen: Seen, run: GraphRun) -> None:
        """Layer m has received d."""
        layer = self.layer(m)
        if m < self.settings.layers and not torch.compiler.is_compiling():
            run.outside.check(layer.name)
        if layer.first:
            check_received(layer.name, describe.tied_of(layer.op).dims, d, seen.weight)
        copied, _ = self._copies(m)
        if copied is None and not d.is_inference():  # which does not count its changes
            run.watched.append((m, 0, d, version_of(d)))
        run.targets[m] = target = d if copied is False else d.clone()
        run.versions[m] = version_of(target)
        run.seen[m] = seen

    def left(self, m: int, y: Tensor, run: GraphRun) -> Tensor:
        """Layer m has given y. Returns what the network goes on with."""
        layer, settings = self.layer(m), self.settings
        out = y
        if run.reconstruct or settings.variant == "full":
            if m + 1 == self.plan.chain:
                run.y = y
                if not run.reconstruct and len(run.seen) == len(self.plan.layers):
                    for k in range(m + 1):
                        self.check_unchanged(run, k)
                    run.sums = self.reverse_all(y, run)
                    self._gather_again(run.sums[-1], range(m + 1), run)
        elif self.reverses(m, run):
            self.check_unchanged(run, m)
            out, loss, report = self.reverse_one(m, y, run, seen_later=not layer.hidden)
            run.found[m] = (loss, report)
            self._gather_again(loss, [m], run)
        _, copied = self._copies(m)
        if copied is not False:
            out = out.clone()
        if copied is None and not out.is_inference():
            run.watched.append((m, 1, out, version_of(out)))
        return out

    def _gather_again(self, sums: Tensor, layers: Sequence[int], run: GraphRun) -> None:
        """The reverse of these layers has just run; its backward will read their weights."""
        if self.shards is not None:
            read = [t for m in layers for t in (run.seen[m].weight, run.seen[m].bias)]
            self.shards.gather_again(sums, [self.layer(m).owner for m in layers], read)

    def _copies(self, m: int) -> tuple[bool | None, bool | None]:
        """Whether d, and y, of a layer are changed in place; None: not known yet. Who compiles sees through copies."""
        if torch.compiler.is_compiling():
            return True, True
        return self.copies.get(m, (None, None))

    def _learn(self, run: GraphRun) -> None:
        """What was changed in place in the first forward of a layer."""
        for m, which, tensor, version in run.watched:
            d, y = self.copies.get(m, (False, False))
            changed = version_of(tensor) != version
            self.copies[m] = (changed, y) if which == 0 else (d, changed)

    def _check_complete(self, run: GraphRun) -> None:
        names = self.plan.names
        if run.reconstruct or self.settings.variant == "full":
            chain = self.plan.chain or 0
            if run.y is None or len([m for m in run.seen if m < chain]) < chain:
                raise RuntimeError(
                    f"the forward ran {len(run.seen)} of the {chain} planned layers ({', '.join(names[:chain])}); "
                    "unwrap and wrap again after changing the model"
                )
            return
        lost = [names[m] for m in run.seen if self.reverses(m, run) and m not in run.found]
        if lost:
            raise RuntimeError(
                f"what follows layer {lost[0]!r} is not what it was when the model was planned; {remedy()}"
            )
        if not run.seen:
            raise RuntimeError(
                f"the forward ran none of the planned layers ({', '.join(names)}); unwrap and wrap again after "
                "changing the model"
            )

    # ------------------------------------------------------------------ description

    def layers(self, run: Run | None = None) -> list[rk.Layer]:
        return [self._describe(m, run)[0] for m in range(len(self.plan.layers))]

    def _describe(self, m: int, run: Run | None) -> tuple[rk.Layer, list[rk.Latent]]:
        layer = self.layer(m)
        seen = run.seen.get(m) if isinstance(run, GraphRun) else None
        training = tuple([step.training for step in seen.latent]) if seen is not None else (True,) * len(layer.latent)
        key = (m, training)
        if key not in self._described:
            own = [
                described_latent(module, self.settings.norm, t)
                for module, t in zip(layer.latent, training, strict=True)
            ]
            activation = self.settings.input_activation
            if layer.first and activation is not None:
                own = [describe.latent_of(activation)]
            tied = describe.tied_of(layer.op)
            spec = rk.Layer(tied, describe.steps_of(layer.pre, tied.dims), tuple(own), compare=m < self.settings.layers)
            self._described[key] = spec, own
        return self._described[key]

    def operands(self, m: int, run: Run) -> Operands:
        if not isinstance(run, GraphRun):
            raise TypeError(f"a graph needs a run of its own, got {type(run).__name__}")
        seen, (_, own) = run.seen[m], self._describe(m, run)
        params: list[Tensor | None] = []
        for value, step in zip(own, seen.latent if self.layer(m).latent else [], strict=False):
            if isinstance(value, Norm):
                weight, bias, mean, var = step.tensors
                params += [weight, bias, *((mean.clone(), var.clone()) if value.running else (None, None))]
            elif isinstance(value, Activation) and value.tensors:
                params += step.tensors
        found = Operands(seen.weight, seen.bias, params)
        if self.shards is not None:
            return self.shards.whole(self.plan.names[m], m, found, self.settings.variant)
        return found
