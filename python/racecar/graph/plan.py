"""Sorts the calls of a forward into layers, by the rules of a graph.

Of a tied operation: back from its input over pooling, up-sampling and dropout to d, what the layer receives; further
back over norms and activations, which made d, up to a tied operation or to anything else, an addition for example:
these are what the reverse applies to what comes back. Ahead from its result over norms and activations, each the only
reader of the one before it, to y.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from racecar_kernels import describe

from ..plan import Plan, PlannedLayer
from .calls import Family
from .network import NO_PARAMETER, Call, Network

_SHAPES = frozenset(
    ("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "unflatten", "contiguous")
)
_NEVER = (nn.modules.conv._ConvTransposeNd, nn.RNNBase, nn.Bilinear, nn.Embedding)


@dataclass(frozen=True)
class GraphLayer(PlannedLayer):
    """A layer of a graph: `d` and `y` are places in `Network.calls`, -1 the model's input.

    Attributes:
        owner: the module that has the weight, as `attribute`.
        use: which of the weight's uses this is, 0 the first.
        back: families of the calls from d to the operation.
        made: families of the calls that made d, back to where the reverse stops.
        kinds: which norm, activation or pooling each of these is, those that made d first.
        onward: families of the calls from the operation to y.
        behind_tied: those work on what a tied operation gave.
        further: whether other norms and activations may stand in front of those that made d: there is one that cannot
            be undone, or a call whose inside only a run shows.
        goes_on: likewise of what reads y; what is no mere reshaping, an addition say, may be left out, too.
        hidden: the result is inside a recurrent cell, and computed again for the reverse.
        first: it receives the model's input.
    """

    owner: nn.Module = field(default_factory=nn.Identity)
    attribute: str = "weight"
    use: int = 0
    back: tuple[Family, ...] = ()
    made: tuple[Family, ...] = ()
    kinds: tuple[str, ...] = ()
    onward: tuple[Family, ...] = ()
    behind_tied: bool = False
    further: bool = False
    goes_on: bool = False
    hidden: bool = False
    first: bool = False

    @property
    def ahead(self) -> int:
        """Number of calls from the operation to y."""
        return len(self.onward)

    def weight(self) -> Any:
        """The weight as it is now."""
        own = self.owner._parameters
        return own[self.attribute] if self.attribute in own else getattr(self.owner, self.attribute)

    def parameter(self) -> Tensor:
        own = self.owner._parameters.get(self.attribute)
        return next(self.owner.parameters()) if own is None else own


def plan_network(network: Network, model: nn.Module) -> Plan:
    """All layers of a graph, as a local reverse takes them; `as_chain` keeps those of a full one.

    Raises:
        ValueError: nothing to tie, random activations, or a weight that is not yet initialised.
    """
    plan = Plan([])
    uses: dict[tuple[int, str], int] = {}
    for place, call in enumerate(network.calls):
        if call.family is not Family.TIED:
            continue
        name = call.name
        if call.owner is not None:
            key = (id(call.owner[0]), call.owner[1])
            use = uses[key] = uses.get(key, -1) + 1
            name = f"{name}#{use + 1}" if use else name
        reason = call.reason
        if reason is None and call.owner is not None:
            try:
                plan.layers.append(_layer(network, place, name, uses[key]))
                continue
            except describe.UnsupportedError as unsupported:
                reason = str(unsupported)
            except ValueError as refused:
                raise ValueError(f"layer {name!r}: {refused}") from None
        plan.left_out.append((name, reason or NO_PARAMETER))
    plan.left_out += _not_reached(network, model)
    if not plan.layers:
        reasons = "".join(f"; {name!r}: {reason}" for name, reason in plan.left_out[:5])
        raise ValueError(
            f"{type(model).__name__} has nothing to run backwards: its forward calls no linear layer or convolution "
            f"with a weight of its own on what comes from the input{reasons}"
        )
    for layer in plan.layers:
        if is_lazy(layer.parameter()):
            raise ValueError(f"layer {layer.name!r} is lazy and has no weight yet; run one forward before wrapping")
    plan.chain, plan.obstacle = _chain(network, plan.layers)
    plan.whole = frozenset(network.whole)
    plan.branches = plan.obstacle is not None or _branches(network)
    return plan


def as_chain(plan: Plan) -> None:
    """Keeps of a graph's plan what a full reverse runs: the chain from the input."""
    count = plan.chain or 0
    rest = plan.layers[count:]
    ends = f"behind {plan.layers[count - 1].name!r}, where the chain from the input ends"
    plan.left_out = [*((layer.name, ends) for layer in rest), *plan.left_out]
    plan.layers = plan.layers[:count]


# ------------------------------------------------------------------------------------------ one layer


def _layer(network: Network, place: int, name: str, use: int) -> GraphLayer:
    call = network.calls[place]
    op, owner = call.module, call.owner
    if op is None or owner is None:
        raise describe.UnsupportedError(NO_PARAMETER)
    tied = describe.tied_of(op)
    d, pre = _back(network, place, call, tied.dims)
    latent_from, latent = _made(network, d)
    _check_sizes([network.calls[i] for i in latent], any(network.calls[i].family is Family.PRE for i in pre))
    y, onward = _ahead(network, place)
    made = [] if latent_from == Network.INPUT else latent
    return GraphLayer(
        name=name,
        d=d,
        pre=tuple(_modules(network, pre)),
        op=op,
        latent=tuple(_modules(network, made)),
        y=y,
        owner=owner[0],
        attribute=owner[1],
        use=use,
        back=tuple(network.calls[i].family for i in pre),
        made=tuple(network.calls[i].family for i in made),
        kinds=tuple(network.calls[i].kind for i in (*made, *pre)),
        onward=onward,
        behind_tied=latent_from != Network.INPUT and network.calls[latent_from].family is Family.TIED,
        further=latent_from != Network.INPUT and _shows_latents(network.calls[latent_from]),
        goes_on=any(r != Network.OUTPUT and _is_open(network.calls[r]) for r in network.calls[y].consumers),
        hidden=call.hidden,
        first=latent_from == Network.INPUT,
    )


def _shows_latents(call: Call) -> bool:
    """Whether a run sees norms and activations in this call, at which a plan ends."""
    return call.family is Family.LATENT or call.opaque


def _is_open(call: Call) -> bool:
    """Whether norms and activations may follow what this call reads: it shows some, or a forward may leave it out."""
    return _shows_latents(call) or (call.family is Family.OTHER and call.name.strip("_") not in _SHAPES)


def _modules(network: Network, places: list[int]) -> Iterator[nn.Module]:
    """What describes these calls; dropout is left out."""
    for i in places:
        call = network.calls[i]
        if call.module is not None and call.family in (Family.PRE, Family.LATENT):
            yield call.module


def _back(network: Network, place: int, call: Call, dims: int) -> tuple[int, list[int]]:
    """Place of d, and the calls between it and the operation."""
    at = call.inputs[0]
    pad = at != Network.INPUT and network.calls[at].family is Family.PAD and _pads(call.module)
    own = [at] if pad else []
    if pad:
        at = network.calls[at].inputs[0]
    steps: list[int] = []
    while at != Network.INPUT and _can_undo([network.calls[i] for i in (at, *steps)], dims):
        steps.insert(0, at)
        at = network.calls[at].inputs[0]
    return at, [*steps, *own]


def _pads(module: nn.Module | None) -> bool:
    return getattr(module, "padding_mode", "zeros") != "zeros"


def _can_undo(steps: list[Call], dims: int) -> bool:
    if steps[0].family is Family.SILENT:
        return True
    if steps[0].family is not Family.PRE:
        return False
    try:
        describe.steps_of([s.module for s in steps if s.family is Family.PRE and s.module is not None], dims)
    except describe.UnsupportedError:
        return False
    return all(s.reason is None for s in steps)


def _made(network: Network, d: int) -> tuple[int, list[int]]:
    """Where the norms and activations that made d begin, and their calls in forward order."""
    at = d
    steps: list[int] = []
    while at != Network.INPUT and _is_latent(network.calls[at]):
        steps.insert(0, at)
        at = network.calls[at].inputs[0]
    while steps and network.calls[steps[0]].family is Family.SILENT:
        steps.pop(0)
    return at, steps


def _is_latent(call: Call) -> bool:
    if call.family is Family.SILENT:
        return True
    if call.family is not Family.LATENT or call.module is None:
        return False
    describe.latent_of(call.module)  # refuses what is random
    return True


def _ahead(network: Network, place: int) -> tuple[int, tuple[Family, ...]]:
    """Place of y, and the families of the calls on the way to it."""
    at, y = place, place
    steps: list[Family] = []
    onward: tuple[Family, ...] = ()
    while len(network.calls[at].consumers) == 1:
        reader = network.calls[at].consumers[0]
        if reader == Network.OUTPUT or network.calls[reader].inputs[0] != at or not _is_latent(network.calls[reader]):
            break
        at = reader
        steps.append(network.calls[at].family)
        if network.calls[at].family is Family.LATENT:  # a dropout belongs to what follows it
            y, onward = at, tuple(steps)
    return y, onward


def _check_sizes(latent: list[Call], resized: bool) -> None:
    """A layer norm over the image's rows and columns cannot meet what comes back at another size."""
    for call in latent:
        if resized and isinstance(call.module, nn.LayerNorm):
            raise describe.UnsupportedError(
                f"layer norm over {tuple(call.module.normalized_shape)} does not fit what comes back before pooling"
            )


# ------------------------------------------------------------------------------------------ the whole


def _not_reached(network: Network, model: nn.Module) -> Iterator[tuple[str, str]]:
    """Operations with weights that are no layers, with the reason."""
    how = (
        "was not seen in the traced forward; an example= shows what runs"
        if network.traced
        else "did not run on example="
    )
    seen = {id(call.owner[0]) for call in network.calls if call.owner is not None}
    for name, module in model.named_modules():
        if isinstance(module, _NEVER):
            yield name, f"{type(module).__name__} has no reverse here"
        elif describe.is_a(module, describe.TIED) and id(module) not in seen:
            yield name, how


def _chain(network: Network, layers: list[Any]) -> tuple[int, str | None]:
    """How many of the layers are a chain from the input, and why a full reverse cannot run; None if it can."""
    at, count = Network.INPUT, 0
    while True:
        readers = network.consumers(at)
        if len(readers) > 1:
            return count, f"the output of {_name(network, at)} goes to {_names(network, readers)}"
        if count and at == layers[count - 1].y and (count == len(layers) or layers[count].d != at):
            return count, None
        if not readers or readers[0] == Network.OUTPUT:
            return count, None if count else "no layer is reached from the input alone"
        at = readers[0]
        if network.calls[at].hidden:
            return count, f"{network.calls[at].name!r} is inside a recurrent cell"
        if count < len(layers) and _place(network, layers[count]) == at:
            count += 1


def _branches(network: Network) -> bool:
    """Whether there is more than one path from the model's output to its input."""
    every = [network.readers, *(call.consumers for call in network.calls)]
    return any(len(readers) > 1 for readers in every)


def _place(network: Network, layer: GraphLayer) -> int:
    """Place of the tied operation itself."""
    at = layer.y
    for _ in range(layer.ahead):
        at = network.calls[at].inputs[0]
    return at


def _name(network: Network, place: int) -> str:
    """Of a function: with the tied operation that it follows, by which it is found in the model."""
    if place == Network.INPUT:
        return "the input"
    if network.calls[place].owner is not None:
        return repr(network.calls[place].name)
    at = place
    while at != Network.INPUT and network.calls[at].owner is None:
        at = network.calls[at].inputs[0]
    behind = f" behind {network.calls[at].name!r}" if at != Network.INPUT else ""
    return f"{network.calls[place].name!r}{behind}"


def _names(network: Network, places: list[int]) -> str:
    names = [_name(network, p) if p != Network.OUTPUT else "the model's output" for p in places[:3]]
    more = [f"{len(places) - 3} more"] if len(places) > 3 else []
    return " and ".join([*names, *more])


def described_latent(module: nn.Module, norm: str, training: bool) -> Any:
    """A norm or activation of a layer as the operators take it, with its norm as it ran."""
    if module.training != training:
        twin = nn.Module.__new__(type(module))
        twin.__dict__.update({**module.__dict__, "training": training})
        module = twin
    return describe.latent_of(module, norm)
