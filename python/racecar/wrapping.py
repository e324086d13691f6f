"""`racecar.wrap`: one line that lets a model train backwards too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import racecar_kernels as rk
from racecar_kernels import describe
from racecar_kernels.functional import REDUCTIONS, check_choice

from . import checkpointing, graph
from .engine import Engine, Settings
from .hooks import ChainEngine
from .part import PartEngine, chain_inside
from .plan import Plan, plan_chain
from .planning import choose_variant, plan_of
from .run import current_thread
from .sampling import Sample
from .undisturbed import undisturbed
from .weights import Lam, parse_lam

VARIANTS = ("full", "local", "auto")
MEMORY = ("store", "recompute", "deferred")
NORMS = ("batch", "running")
_FACE = ("lam", "reverse_loss", "reverse_losses", "reconstruct", "plan", "unwrap")
_KEY = "_racecar_engine"
_BEFORE = "reverse_loss belongs to a forward pass; call the model first"
_TWO_THREADS = (
    "this wrapped model is running in another thread; give every thread its own copy.deepcopy of it, or use "
    "DistributedDataParallel, which has a process for each, in place of DataParallel"
)
_NOT_WRAPPED = "this is a part of a wrapped model, and not wrapped itself; call racecar.wrap on it"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Reversible(nn.Module):
    """What a wrapped model has beside its own attributes. `wrap` mixes it into the model's class."""

    @property
    def lam(self) -> list[float]:
        """λ of every compared layer, m = 1 first. Set a number, a sequence or a mapping by layer name at any time."""
        return list(_engine(self).lam)

    @lam.setter
    def lam(self, value: Lam) -> None:
        engine = _engine(self)
        engine.set_lam(parse_lam(value, engine.plan.names[: engine.settings.layers]))

    @property
    def reverse_loss(self) -> Tensor:
        """Σ λ_m · loss_m of the last forward: a scalar in float32 or wider, to be added to the task's loss.

        0 in eval mode and while every λ is 0. With `memory="deferred"` it reads 0 until its backward has run.
        """
        result = _engine(self).result
        if result is None:
            raise AttributeError(_BEFORE)
        if not result.reports:
            return result.total
        known = [(s, w) for s, w in zip(result.known_sums(), result.weights_of_layers(), strict=True) if s is not None]
        return torch.stack([s * w for s, w in known]).sum() if known else result.total

    @property
    def reverse_losses(self) -> dict[str, Tensor]:
        """Layer name -> unweighted loss of the last forward, m = 1 first; detached scalars, empty if none is known."""
        engine = _engine(self)
        if engine.result is None:
            return {}
        sums, factors = engine.result.known_sums(), engine.result.factors
        names = engine.plan.names[: len(sums)]
        return {name: s * f for name, s, f in zip(names, sums, factors, strict=True) if s is not None}

    @property
    def plan(self) -> Plan:
        """Which layers run backwards, and why the others do not; print it for a table."""
        engine = _engine(self)
        engine.plan.layer_by_layer = engine.why_layer_by_layer(self)
        return engine.plan

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """d'_1: what comes back when x runs through the network and all the way back, in the shape of x.

        Always the full reverse, whatever the variant. Without gradient; changes no buffer and no random state. Raises
        ValueError where the path from output to input is not unique.
        """
        engine = _engine(self)
        if not isinstance(x, Tensor):
            raise TypeError(f"reconstruct takes the model's input, a tensor, got {type(x).__name__}")
        with undisturbed(self), engine.recording(reconstruct=True) as run:
            super().forward(x, *args, **kwargs)
            back = engine.reconstruct(run)
        return back.reshape(x.shape) if back.shape != x.shape and back.numel() == x.numel() else back

    def unwrap(self) -> nn.Module:
        """Gives the plain model back: the same object, of its own class, with no hook left.

        Raises RuntimeError if something else (FSDP, a parametrization of the model itself) has changed the class since.
        """
        engine = _engine(self)
        if type(self) is not _wrapped_class(engine.base):
            raise RuntimeError(
                f"the model's class was changed to {type(self).__name__} after wrapping; undo that before unwrap()"
            )
        engine.detach(self)
        del self.__dict__[_KEY]
        model: nn.Module = self
        model.__class__ = engine.base
        return model

    def __getattr__(self, name: str) -> Any:
        # Python asks here after one of the properties has raised AttributeError, whose message it drops
        if name in _FACE:
            raise AttributeError(_BEFORE if _KEY in self.__dict__ else _NOT_WRAPPED)
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        engine: Engine | None = self.__dict__.get(_KEY)
        if engine is None:  # a slice of a wrapped nn.Sequential is made of its class, but not wrapped
            return super().forward(*args, **kwargs)
        if engine.run is not None:  # the model around this part records what runs through it
            threads = {engine.run.thread, current_thread()} - {0}  # 0: torch.compile traces, in whichever
            if len(threads) > 1:
                raise RuntimeError(_TWO_THREADS)
            return super().forward(*args, **kwargs)
        if checkpointing.runs_again():
            with checkpointing.first_result_kept(engine):
                return self._forward(engine, args, kwargs)
        return self._forward(engine, args, kwargs)

    def _forward(self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        engine.set_result(None)  # lets go of the last forward's graph before a new one is built
        if not engine.active(self):
            return engine.without_reverse(self, super().forward, args, kwargs)
        return engine.forward(self, super().forward, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        engine = self.__dict__.get(_KEY)
        if type(self) not in _CLASSES.values():  # somebody else's subclass of ours knows how to copy itself
            return super().__reduce_ex__(protocol)
        base = engine.base if engine is not None else type(self).__mro__[2]
        return _rebuild, (base,), self.__dict__


def engine_of(model: nn.Module) -> Engine | None:
    """The reverse pass of a wrapped model; None: it is not wrapped."""
    engine: Engine | None = model.__dict__.get(_KEY)
    return engine


def wrapped_parts(model: nn.Module) -> dict[str, Reversible]:
    """The wrapped modules of a model, itself included: prefix of their layers' names ("", "features.") -> module."""
    found = {name: module for name, module in model.named_modules() if _KEY in module.__dict__}
    inside = [engine.part for engine in map(engine_of, found.values()) if isinstance(engine, PartEngine)]
    found = {name: module for name, module in found.items() if not any(module is part for part in inside)}
    return {f"{name}." if name else "": module for name, module in found.items() if isinstance(module, Reversible)}


def wrap(
    model: nn.Module,
    lam: Lam,
    *,
    variant: str = "auto",
    layers: int | None = None,
    reduction: str = "l2",
    norm: str = "batch",
    memory: str = "store",
    input_activation: nn.Module | None = None,
    backend: str | None = None,
    example: Any = None,
    sample: Sample | None = None,
) -> Any:
    """Lets `model` train together with its own reverse pass (Xie & Thuerey et al. 2020, 2021).

        net = racecar.wrap(model, lam=1e-5)
        loss = criterion(net(x), t) + net.reverse_loss

    Every layer is run backwards with its own weights; loss_m compares what layer m received, d_m, with what comes
    back, d'_m, and Σ λ_m · loss_m joins the task's loss. No gradient is stopped anywhere.

    Args:
        model: any module. It stays the same object, with its parameter names, `state_dict` keys, attributes and base
            class; `unwrap` undoes everything. A (nested) `nn.Sequential` runs forward and reverse as one chain where it
            can; the forward of any other model is looked at call by call.
        lam: λ as one number, one per compared layer, or a mapping from layer names; settable later as `net.lam`.
        variant: `full` runs one reverse pass from output to input, `local` reverses every layer from what it gave;
            `auto` is full where the path from output to input is unique, else local.
        layers: RR^s: only the first s layers are compared. None: all.
        reduction: `l2` = ½·Σ(·)² over batch and elements, `sum` = Σ(·)², `mean` = mean(·)².
        norm: statistics of the reverse batch norms: `batch` (of what comes back) or `running`.
        memory: `store` keeps one tensor per layer for the backward, `recompute` (almost) none, `deferred` (local
            only) none, and computes the reverse in the backward pass.
        input_activation: applied to the reconstructed input; none by default.
        backend: name of one of `racecar_kernels.backends(on_request=True)`; None chooses.
        example: an input of the model, or a tuple of its arguments, or a dictionary of them by name. Its forward is
            then run once to find the layers; without it, torch.fx finds them without running the model, where it can.
        sample: a cheaper reverse pass, of a part of the layers or of the batch in every forward; None: of everything.

    Returns:
        `model` itself, now with `lam`, `reverse_loss`, `reverse_losses`, `reconstruct`, `plan` and `unwrap`.

    Raises:
        ValueError: a value that is not among the choices; a bad λ; a model with nothing to tie, that is wrapped
            already, or that has an attribute of one of these names; a full reverse without a unique path.
        TypeError: `model` or `input_activation` is no module, λ no number, sequence or mapping, `layers` no whole
            number, or the weights are complex or integers.
    """
    _check_model(model)
    check_choice("variant", variant, VARIANTS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("norm", norm, NORMS)
    check_choice("memory", memory, MEMORY)
    _check_activation(input_activation)
    plan = plan_of(model, example)
    variant = choose_variant(variant, memory, plan)
    if plan.chain is not None and variant == "full":
        graph.as_chain(plan)
    compared = _count(layers, len(plan.layers))
    _check_sample(sample, variant)
    settings = Settings(variant, compared, reduction, norm, memory, input_activation, backend, sample)
    values = parse_lam(lam, plan.names[:compared])
    engine = _engine_for(model, plan, settings)
    engine.set_lam(values)
    plan.variant, plan.compared = variant, compared
    plan.kernel, plan.kernels = _kernels(engine, backend)
    _put_on(model, engine)
    return model


def _engine_for(model: nn.Module, plan: Plan, settings: Settings) -> Engine:
    if plan.chain is None:
        return ChainEngine(model, plan, settings)
    inside = chain_inside(model, plan) if settings.variant == "full" else None
    if inside is None:
        return graph.GraphEngine(model, plan, settings)
    _, part = inside
    inner = ChainEngine(part, plan_chain(part), settings)
    inner.plan.variant, inner.plan.compared = settings.variant, settings.layers
    _put_on(part, inner)
    return PartEngine(model, plan, settings, part, inner)


def _put_on(model: nn.Module, engine: Engine) -> None:
    engine.attach()
    model.__dict__[_KEY] = engine
    model.__class__ = _wrapped_class(type(model))


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if type(model) in _CLASSES.values() and _KEY not in model.__dict__:  # a slice of a wrapped nn.Sequential
        model.__class__ = type(model).__mro__[2]
    for name, module in model.named_modules():
        if _KEY in module.__dict__:
            where = f"its part {name!r}" if name else "it"
            raise ValueError(f"this model cannot be wrapped, {where} is wrapped already; call unwrap() on that first")
    own = {*model.__dict__, *model._modules, *model._parameters, *model._buffers}
    taken = [name for name in _FACE if name in own or hasattr(type(model), name)]
    if taken:
        raise ValueError(
            f"{type(model).__name__} has attributes of its own named {', '.join(taken)}, which wrap would hide; "
            "rename them, or put the model into an nn.Sequential and wrap that"
        )


def _check_activation(module: object) -> None:
    if module is None:
        return
    if not isinstance(module, nn.Module):
        raise TypeError(f"input_activation must be a module such as nn.ReLU(), got {type(module).__name__}")
    parameters = any(True for _ in module.parameters())
    if parameters or not describe.is_a(module, describe.ACTIVATIONS):
        raise ValueError(
            f"input_activation must be an elementwise activation without parameters such as nn.Tanh(), got {module}"
        )


def _check_sample(sample: object, variant: str) -> None:
    if sample is not None and not isinstance(sample, Sample):
        raise TypeError(f"sample must be a racecar.Sample, got {type(sample).__name__}")
    if sample is not None and sample.layers > 1 and variant == "full":
        raise ValueError(
            f"Sample(layers={sample.layers}) needs variant='local': a full reverse passes through all layers; "
            "Sample(batch=...) and fewer layers= work with it"
        )


def _count(layers: object, n: int) -> int:
    if layers is None:
        return n
    if not isinstance(layers, int) or isinstance(layers, bool):
        raise TypeError(f"layers must be None or a whole number from 1 to {n}, got {layers!r}")
    if not 1 <= layers <= n:
        raise ValueError(f"layers must be from 1 to {n}, the number of layers that run backwards, got {layers}")
    return layers


def _kernels(engine: Engine, backend: str | None) -> tuple[str, list[str]]:
    """Names of the backends that serve the layers as they are now; and by layer, with the way that it is computed."""
    parameters = [layer.parameter() for layer in engine.plan.layers]
    for layer, p in zip(engine.plan.layers, parameters, strict=True):
        if not p.is_floating_point():
            raise TypeError(f"layer {layer.name!r} has {p.dtype} weights; the reverse needs real floating-point ones")
    names, ways = [], []
    for spec, weight in zip(engine.layers(), parameters, strict=True):
        chosen = rk.choose(rk.Query(spec, weight.device.type, weight.dtype), backend)
        names.append(chosen.name)
        ways.append(chosen.name if chosen.way is None else f"{chosen.name}, {chosen.way(weight, spec.tied)}")
    return ", ".join(dict.fromkeys(names)), ways


def _engine(model: nn.Module) -> Engine:
    engine = model.__dict__.get(_KEY)
    if engine is None:
        raise AttributeError(_NOT_WRAPPED)
    return engine


def _wrapped_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `base`, so that isinstance holds; one per class, so that types compare equal."""
    if base in _CLASSES:
        return _CLASSES[base]
    names = {"__module__": base.__module__, "__doc__": base.__doc__}
    _CLASSES[base] = type(f"Racecar{base.__name__}", (Reversible, base), names)
    return _CLASSES[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = _wrapped_class(base)
    return cls.__new__(cls)
