"""Finds a model's graph of calls without running it, by torch.fx; where its Python does not allow that, says so."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn

from racecar_kernels import describe

from ..undisturbed import attributes_kept, undisturbed
from . import calls
from .calls import Family
from .network import NO_PARAMETER, NOT_OF_THE_INPUT, Call, Network
from .record import Owners

_NUMBERS = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "type", "element_size")
)
_PLAIN = frozenset(("torch", "_operator", "operator", "builtins", "math"))
_CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)


class TraceError(ValueError):
    """torch.fx cannot follow the model's forward; the message says why."""


def trace(model: nn.Module) -> Network:
    """The calls of the model's forward, whatever its input. Raises TraceError."""
    try:
        with (
            attributes_kept(model),
            undisturbed(model),
        ):  # what does not depend on the input runs while it is traced: counters, random numbers
            graph = fx.Tracer().trace(model, concrete_args=_defaults(model))
    except Exception as error:  # the model's own code runs on stand-ins, and may fail in any way
        raise TraceError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return _Reader(model, graph).network


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Arguments that a plain call leaves out: a trace would take `if mask is not None` for true."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _is_opaque(func: Any) -> bool:
    """Whether a function is one of the model's own, wrapped for torch.fx; PyTorch's show nothing of what they call."""
    return str(getattr(func, "__module__", None) or "torch").partition(".")[0] not in _PLAIN


class _Reader:
    """From the nodes of torch.fx to calls."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model, self.network, self.owners = model, Network(traced=True), Owners(model)
        self.places: dict[fx.Node, int] = {}
        given = _defaults(model)  # a trace checks them, as name_1 and the like
        for node in graph.nodes:
            if node.op == "placeholder":
                if str(node.target).rpartition("_")[0] not in given and node.target not in given:
                    self.places[node] = Network.INPUT
            elif node.op == "output":
                for source in node.all_input_nodes:
                    if source in self.places:
                        self.network.consumers(self.places[source]).append(Network.OUTPUT)
            elif node.op != "get_attr":
                self._read(node)

    def _read(self, node: fx.Node) -> None:
        inputs = tuple(self.places[n] for n in node.all_input_nodes if n in self.places)
        numbers = node.target is getattr or (node.op == "call_method" and node.target in _NUMBERS)
        self.network.whole |= {path for path, _ in node.meta.get("nn_module_stack", {}).values()}
        if not inputs and node.op == "call_module":
            self._on_a_constant(str(node.target))
        if not inputs or numbers:
            return
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            if isinstance(module, nn.Identity):
                self.places[node] = inputs[0]
                return
            self._module(str(node.target), module, node, inputs)
        else:
            self._function(node, inputs)
        self.places[node] = len(self.network.calls) - 1
        if node.args and isinstance(node.args[0], fx.Node) and self._in_place(node):
            self.places[node.args[0]] = self.places[node]  # who reads it from here on reads what was made of it

    def _on_a_constant(self, name: str) -> None:
        """A use of a weight that counts, and is no layer."""
        module = self.model.get_submodule(name)
        if calls.family_of_module(module) is Family.TIED:
            call = Call(name, Family.TIED, (), reason=NOT_OF_THE_INPUT, owner=(module, "weight"))
            self.network.add(call)

    def _in_place(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.model.get_submodule(str(node.target)), "inplace", False))
        func = getattr(torch.Tensor, str(node.target), node.target) if node.op == "call_method" else node.target
        return calls.works_in_place(func, node.kwargs)

    # ------------------------------------------------------------------ modules

    def _module(self, name: str, module: nn.Module, node: fx.Node, inputs: tuple[int, ...]) -> None:
        if isinstance(module, nn.MultiheadAttention):
            self._attention(name, module, node, inputs)
            return
        if isinstance(module, _CELLS):
            self._projection(f"{name}.weight_ih", module, "weight_ih", inputs[0], hidden=True)
            place = self._projection(f"{name}.weight_hh", module, "weight_hh", inputs[-1], hidden=True)
            if len(inputs) == 1:
                self.network.calls[place].reason = "its state is new, and does not come from the input"
        family = calls.family_of_module(module)
        call = Call(name, family, inputs)
        if family is not Family.OTHER:
            call.module = module
        elif isinstance(module, nn.RReLU):
            call.family, call.module = Family.LATENT, module
        else:
            call.name = f"{type(module).__name__} {name!r}"
            call.opaque = any(True for _ in module.children())
        if family is Family.TIED:
            found = self.owners.of(getattr(module, "weight"))  # noqa: B009
            call.name, call.owner = (name, (module, "weight")) if found is None else (found[0], found[1:])
            if getattr(module, "padding_mode", "zeros") != "zeros":
                call.inputs = (self.network.add(Call("pad", Family.PAD, inputs)),)
        self.network.add(call)

    def _projection(self, name: str, owner: nn.Module, attribute: str, place: int, *, hidden: bool) -> int:
        weight: Any = getattr(owner, attribute)
        op = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        return self.network.add(Call(name, Family.TIED, (place,), op, owner=(owner, attribute), hidden=hidden))

    def _attention(self, name: str, module: nn.MultiheadAttention, node: fx.Node, inputs: tuple[int, ...]) -> None:
        """Self-attention projects its input once; of any other, the parts of the weight are computed in the forward."""
        query, key, value = ([*node.args, *(node.kwargs.get(k) for k in ("query", "key", "value"))] + [None] * 3)[:3]
        place = inputs[0]
        if module.batch_first:  # turned around in front of the projection
            place = self.network.add(Call("transpose", Family.OTHER, (place,)))
        if query is key is value and module._qkv_same_embed_dim:
            place = self._projection(f"{name}.in_proj_weight", module, "in_proj_weight", place, hidden=False)
        self.network.add(Call(f"attention {name!r}", Family.OTHER, (place, *inputs)))
        place = len(self.network.calls) - 1
        found = self.owners.of(module.out_proj.weight)
        own = f"{name}.out_proj.weight" if found is None else found[0]
        self._projection(own, module.out_proj, "weight", place, hidden=False)
        # what leaves the module is a tuple, of which the projection's result is only a part
        self.network.add(Call(f"MultiheadAttention {name!r}", Family.OTHER, (len(self.network.calls) - 1,)))

    # ------------------------------------------------------------------ functions

    def _function(self, node: fx.Node, inputs: tuple[int, ...]) -> None:
        func: Any = node.target
        if node.op == "call_method":
            func = getattr(torch.Tensor, str(node.target), node.target)
        family = calls.FAMILIES.get(func, Family.OTHER)
        first = node.args[0] if node.args else node.kwargs.get("input")
        if family is not Family.OTHER and (not isinstance(first, fx.Node) or self.places.get(first) != inputs[0]):
            family = Family.OTHER
        args, kwargs = ([self._constant(a) for a in node.args], {k: self._constant(v) for k, v in node.kwargs.items()})
        call = Call(calls.name_of(func), family, inputs, opaque=_is_opaque(func))
        if family is not Family.OTHER:
            try:
                call.module = calls.described(func, tuple(args), kwargs)
            except (describe.UnsupportedError, AttributeError) as reason:
                call.reason = str(reason)
            if family is Family.TIED:
                self._own(call, tuple(args), kwargs, node)
        self.network.add(call)

    def _own(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], node: fx.Node) -> None:
        found = self.owners.of(calls.tied_tensors(args, kwargs)[1])
        if found is None:
            call.reason = NO_PARAMETER
            around = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
            call.name = around[-1] if around else call.name
            return
        call.name, call.owner = found[0], found[1:]
        if describe.is_a(found[1], describe.TIED):
            call.module = found[1]

    def _constant(self, value: Any) -> Any:
        """A parameter instead of the node that gets it."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            owner, _, attribute = str(value.target).rpartition(".")
            return getattr(self.model.get_submodule(owner), attribute, value)
        return value
