"""Which layers of a model run backwards, and why the others do not.

A *layer* is `pre` (pooling, up-sampling, dropout), then the tied operation, then its latent: the norms and activations
behind it. This module finds the layers of a chain: a (nested) `nn.Sequential`. It looks at modules only and computes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from racecar_kernels import describe

_SILENT = (nn.Identity, *describe.DROPOUTS)


@dataclass(frozen=True)
class PlannedLayer:
    """The record of one reverse layer: where its d and y are seen, and what leads back from y to d.

    Nothing in it refers to a neighbour, so that a planner for other graphs than chains can fill it too.

    Attributes:
        name: path of the tied operation in the model (`0`, `features.3`); a second use of a module ends in `#2`.
        d: place in `Plan.order` of the module whose input is d, what the layer receives.
        pre: pooling, up-sampling and dropout between d and the operation.
        op: Linear, Conv1d, Conv2d or Conv3d.
        latent: norms and activations that made d, in their forward order: the reverse applies them to what comes back.
        y: place in `Plan.order` of the module whose output is y, the last of the layer's own norms and activations.
    """

    name: str
    d: int
    pre: tuple[nn.Module, ...]
    op: Any  # a module of describe.TIED: has weight and bias
    latent: tuple[nn.Module, ...]
    y: int

    def parameter(self) -> Tensor:
        """A parameter that the operation's weight is, or is computed from."""
        found: Tensor = next(self.op.parameters())
        return found


@dataclass
class Plan:
    """The layers that run backwards, and the operations that do not with the reason. Print it for a table.

    Attributes:
        layers: m = 1 first.
        left_out: (name, reason) of what is not covered.
        order: the chain's modules as they run, up to where it ends; one that is used twice stands there twice.
        obstacle: why there is no unique path from output to input, None if there is one.
        variant: `full` or `local`.
        kernel: backend that serves the layers; several are listed.
        kernels: of every layer its backend, and in which way that computes it where there are several.
        compared: number of layers, from the input, whose loss counts.
        layer_by_layer: why the chain does not run as one autograd node, which would keep less; None if it does.
        chain: of a graph, how many of the layers are a chain from the input; None: all.
        whole: of a graph, paths of the modules that its forward calls as a whole.
        branches: of a graph, whether its paths part anywhere, be it behind that chain.
    """

    layers: list[PlannedLayer]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    order: list[nn.Module] = field(default_factory=list)
    obstacle: str | None = None
    variant: str = "full"
    kernel: str = "reference"
    kernels: list[str] = field(default_factory=list)
    compared: int = 0
    layer_by_layer: str | None = None
    chain: int | None = None
    branches: bool = False
    whole: frozenset[str] = frozenset()

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def __str__(self) -> str:
        rows = [("layer", "tied to", "variant", "kernel", "why not, or note")]
        for m, layer in enumerate(self.layers):
            note = "" if m < self.compared else f"passed through, not compared (layers={self.compared})"
            kernel = self.kernels[m] if self.kernels else self.kernel
            rows.append((layer.name, _way_back(layer), self.variant, kernel, note))
        rows += [(name, "-", "-", "-", reason) for name, reason in self.left_out]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        how = "as one node" if self.layer_by_layer is None else f"layer by layer: {self.layer_by_layer}"
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], f"forward and reverse run {how}"])


def plan_chain(model: nn.Module) -> Plan:
    """Finds the layers of a chain, from the input up to the first operation whose shape cannot be undone.

    Raises:
        ValueError: the model is no chain, has nothing to tie, draws random activations, or is not yet initialised.
    """
    if not is_chain(model):
        raise ValueError(f"{type(model).__name__} is not a (nested) nn.Sequential, and has no chain of modules to plan")
    walk = _Walk()
    for name, module in leaves(model):
        walk.step(name, module)
    if not walk.layers:
        raise ValueError(
            f"{type(model).__name__} has nothing to run backwards: it needs at least one nn.Linear, nn.Conv1d, "
            f"nn.Conv2d or nn.Conv3d that a chain from the input reaches" + walk.reasons()
        )
    walk.check_shapes()
    plan = Plan(walk.layers, walk.left_out, walk.order, walk.obstacle)
    for layer in plan.layers:
        if any(is_lazy(p) for p in layer.op.parameters()):
            raise ValueError(f"layer {layer.name!r} is lazy and has no weight yet; run one forward before wrapping")
    return plan


def is_chain(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a chain as they run, those of nested chains included; one that is used twice comes twice."""
    for name, child in module._modules.items():  # named_children would leave out a module's second use
        if child is None:
            continue
        if is_chain(child):
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class _Walk:
    """Walks along the chain once and sorts every module into the layers."""

    def __init__(self) -> None:
        self.layers: list[PlannedLayer] = []
        self.left_out: list[tuple[str, str]] = []
        self.order: list[nn.Module] = []
        self.obstacle: str | None = None
        self.pre: list[nn.Module] = []
        self.behind: list[nn.Module] = []  # norms and activations since the last tied operation
        self.stop: str | None = None

    def step(self, name: str, module: nn.Module) -> None:
        if self.stop is not None:
            self._behind_the_stop(name, module)
            return
        self.order.append(module)
        if describe.is_a(module, describe.TIED):
            self._try(name, module, lambda: self._add_layer(name, module))
        elif describe.is_a(module, _SILENT):
            self.pre.append(module)
        elif isinstance(module, nn.Flatten) and not self.layers and not self._pooled():
            self.pre = []  # belongs to the input: d_1 is flattened
        elif describe.is_a(module, describe.PRE):
            self._try(name, module, lambda: self._add_pre(module))
        elif not self.layers and describe.is_a(module, (*describe.NORMS, *describe.ACTIVATIONS)):
            if self._pooled():
                self._end(name, module, "a norm or activation between pooling and the first layer")
            self.pre = []  # prepares the input: d_1 is what the first layer receives
        elif self._pooled():
            self._end(name, module, f"{_kind(module)} behind pooling or up-sampling cannot be undone; put it in front")
        else:
            self._try(name, module, lambda: self._add_latent(module))

    def _add_layer(self, name: str, module: nn.Module) -> None:
        dims = describe.tied_of(module).dims
        describe.steps_of(self.pre, dims)
        uses = sum(layer.op is module for layer in self.layers)
        name, at = f"{name}#{uses + 1}" if uses else name, len(self.order) - 1
        self.layers.append(PlannedLayer(name, at - len(self.pre), tuple(self.pre), module, tuple(self.behind), at))
        self.pre, self.behind = [], []

    def _add_pre(self, module: nn.Module) -> None:
        describe.step_of(module)
        self.pre.append(module)

    def _add_latent(self, module: nn.Module) -> None:
        describe.latent_of(module)
        self.behind += [*self.pre, module]
        self.layers[-1] = replace(self.layers[-1], y=len(self.order) - 1)
        self.pre = []  # dropout in front of an activation belongs to the latent, which the reverse runs without it

    def _pooled(self) -> bool:
        return any(not describe.is_a(module, _SILENT) for module in self.pre)

    def _try(self, name: str, module: nn.Module, action: Callable[[], object]) -> None:
        try:
            action()
        except describe.UnsupportedError as reason:
            self._end(name, module, str(reason))
        except ValueError as refused:
            raise ValueError(f"layer {name!r}: {refused}") from None

    def _end(self, name: str, module: nn.Module, reason: str) -> None:
        self.stop = name
        at = len(self.left_out)
        if self._look_inside(name, module):
            reason = f"{_kind(module)} is not a chain of modules"
            self.obstacle = f"{name!r} ({_kind(module)}) is not a chain of modules"
        self.left_out.insert(at, (name, f"ends the chain: {reason}"))

    def _behind_the_stop(self, name: str, module: nn.Module) -> None:
        if describe.is_a(module, describe.TIED):
            self.left_out.append((name, f"behind {self.stop!r}, where the chain ends"))
        else:
            self._look_inside(name, module)

    def _look_inside(self, name: str, module: nn.Module) -> bool:
        """Whether the module has tied operations of its own: a part that this planner does not see into."""
        inside = [
            n for n, m in module.named_modules(prefix=name) if describe.is_a(m, describe.TIED) and m is not module
        ]
        self.left_out += [(n, f"inside {name!r} ({_kind(module)}), which is no chain") for n in inside]
        return bool(inside)

    def check_shapes(self) -> None:
        """A layer norm over the image's rows and columns cannot meet what comes back at another size."""
        for m in range(1, len(self.layers)):
            sized = [n.normalized_shape for n in self.layers[m].latent if isinstance(n, nn.LayerNorm)]
            if sized and any(not describe.is_a(p, _SILENT) for p in self.layers[m].pre):
                reason = f"layer norm over {tuple(sized[0])} does not fit what comes back before pooling"
                self.left_out = [(layer.name, reason) for layer in self.layers[m:]] + self.left_out
                self.layers = self.layers[:m]
                return

    def reasons(self) -> str:
        return "".join(f"; {name!r} {reason}" for name, reason in self.left_out)


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _way_back(layer: PlannedLayer) -> str:
    """`Conv2d 64->64, ReLU, undo MaxPool2d`: what the reverse of this layer does."""
    op = layer.op  # not its weight: a parametrised one is computed anew whenever it is looked at
    sizes = (op.out_features, op.in_features) if describe.tied_of(op).dims == 0 else (op.out_channels, op.in_channels)
    parts = [f"{_kind(op)} {sizes[0]}->{sizes[1]}"]
    parts += [_kind(module) for module in layer.latent if not describe.is_a(module, _SILENT)]
    parts += [f"undo {_kind(module)}" for module in reversed(layer.pre) if not describe.is_a(module, _SILENT)]
    return ", ".join(parts)
