"""`racecar.wrap`: one line that lets a model train backwards too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import racecar_kernels as rk
from racecar_kernels import describe
from racecar_kernels.backends import choose
from racecar_kernels.functional import REDUCTIONS, check_choice

from .engine import Engine, Settings
from .plan import Plan, plan_chain
from .weights import Lam, parse_lam

VARIANTS = ("full", "local", "auto")
MEMORY = ("store", "recompute", "deferred")
NORMS = ("batch", "running")
_FACE = ("lam", "reverse_loss", "reverse_losses", "reconstruct", "plan", "unwrap")
_KEY = "_racecar_engine"


class Reversible(nn.Module):
    """What a wrapped model has beside its own attributes. `wrap` mixes it into the model's class."""

    @property
    def lam(self) -> list[float]:
        """λ of every compared layer, m = 1 first. Set a number, a sequence or a mapping by layer name at any time."""
        return list(_engine(self).lam)

    @lam.setter
    def lam(self, value: Lam) -> None:
        engine = _engine(self)
        engine.lam = parse_lam(value, engine.plan.names[: engine.settings.layers])

    @property
    def reverse_loss(self) -> Tensor:
        """Σ λ_m · loss_m of the last forward: a scalar in float32 or wider, to be added to the task's loss.

        0 in eval mode and while every λ is 0. With `memory="deferred"` it reads 0 until its backward has run.
        """
        result = _engine(self).result
        if result is None:
            raise RuntimeError("reverse_loss belongs to a forward pass; call the model first")
        sums = result.known_sums()
        if result.reports and sums is not None and result.weights is not None:
            return (sums * result.weights).sum()
        return result.total

    @property
    def reverse_losses(self) -> dict[str, Tensor]:
        """Layer name -> unweighted loss of the last forward, m = 1 first; detached scalars, empty if none is known."""
        engine = _engine(self)
        sums = engine.result.known_sums() if engine.result is not None else None
        if engine.result is None or sums is None or engine.result.factors is None:
            return {}
        losses = (sums * engine.result.factors).unbind()
        return dict(zip(engine.plan.names, losses, strict=False))

    @property
    def plan(self) -> Plan:
        """Which layers run backwards, and why the others do not; print it for a table."""
        return _engine(self).plan

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """d'_1: what comes back when x runs through the network and all the way back, in the shape of x.

        Always the full reverse, whatever the variant. Without gradient; changes no buffer and no random state.
        """
        engine = _engine(self)
        devices = [x.device] if x.device.type == "cuda" else []
        buffers = [(module, dict(module._buffers)) for module in self.modules()]
        with torch.random.fork_rng(devices=devices):
            try:
                for module, own in buffers:
                    module._buffers.update({k: None if b is None else b.clone() for k, b in own.items()})
                with engine.recording(reconstruct=True) as run:
                    super().forward(x, *args, **kwargs)
                back = engine.reconstruct(run)
            finally:
                for module, own in buffers:
                    module._buffers.update(own)
        return back.reshape(x.shape) if back.shape != x.shape and back.numel() == x.numel() else back

    def unwrap(self) -> nn.Module:
        """Gives the plain model back: the same object, of its own class, with no hook left."""
        Engine.detach(self)
        del self.__dict__[_KEY]
        self.__class__ = type(self).__bases__[1]
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        engine: Engine | None = self.__dict__.get(_KEY)
        if engine is None:  # a slice of a wrapped nn.Sequential is made of its class, but not wrapped
            return super().forward(*args, **kwargs)
        engine.result = None  # lets go of the last forward's graph before a new one is built
        if not engine.active(self):
            engine.idle(self)
            return super().forward(*args, **kwargs)
        with engine.recording() as run:
            out = super().forward(*args, **kwargs)
        engine.finish(run)
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__bases__[1],), self.__dict__


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
) -> Any:
    """Lets `model` train together with its own reverse pass (Xie & Thuerey et al. 2020, 2021).

        net = racecar.wrap(model, lam=1e-5)
        loss = criterion(net(x), t) + net.reverse_loss

    Every layer is run backwards with its own weights; loss_m compares what layer m received, d_m, with what comes
    back, d'_m, and Σ λ_m · loss_m joins the task's loss. No gradient is stopped anywhere.

    Args:
        model: a (nested) `nn.Sequential`. It stays the same object, with its parameter names, `state_dict` keys,
            attributes and base class; `unwrap` undoes everything.
        lam: λ as one number, one per compared layer, or a mapping from layer names; settable later as `net.lam`.
        variant: `full` runs one reverse pass from output to input, `local` reverses every layer from what it gave;
            `auto` is full where the path from output to input is unique, else local.
        layers: RR^s: only the first s layers are compared. None: all.
        reduction: `l2` = ½·Σ(·)² over batch and elements, `sum` = Σ(·)², `mean` = mean(·)².
        norm: statistics of the reverse batch norms: `batch` (of what comes back) or `running`.
        memory: `store` keeps one tensor per layer for the backward, `recompute` (almost) none, `deferred` (local
            only) none, and computes the reverse in the backward pass.
        input_activation: applied to the reconstructed input; none by default.
        backend: name of one of `racecar_kernels.backends()`; None chooses.

    Returns:
        `model` itself, now with `lam`, `reverse_loss`, `reverse_losses`, `reconstruct`, `plan` and `unwrap`.

    Raises:
        ValueError: a value that is not among the choices; a bad λ; a model with nothing to tie, that is wrapped
            already, or that has an attribute of one of these names; a full reverse without a unique path.
        TypeError: something that is not a module, a number, a mapping ...
    """
    _check_model(model)
    check_choice("variant", variant, VARIANTS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("norm", norm, NORMS)
    check_choice("memory", memory, MEMORY)
    _check_activation(input_activation)
    plan = plan_chain(model)
    variant = _choose_variant(variant, memory, plan)
    compared = _count(layers, len(plan.layers))
    settings = Settings(variant, compared, reduction, norm, memory, input_activation, backend)
    engine = Engine(plan, settings)
    engine.lam = parse_lam(lam, plan.names[:compared])
    plan.variant, plan.compared, plan.kernel = variant, compared, _kernel(model, engine, backend)
    engine.attach()
    model.__dict__[_KEY] = engine
    model.__class__ = _wrapped_class(type(model))
    return model


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if _KEY in module.__dict__:
            where = f"its part {name!r}" if name else "it"
            raise ValueError(f"this model cannot be wrapped, {where} is wrapped already; call unwrap() on that first")
    taken = [name for name in _FACE if hasattr(model, name)]
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
    if any(True for _ in module.parameters()) or not isinstance(describe.latent_of(module), rk.Activation):
        raise ValueError(
            f"input_activation must be an elementwise activation without parameters such as nn.Tanh(), got {module}"
        )


def _choose_variant(variant: str, memory: str, plan: Plan) -> str:
    if variant == "full" and plan.obstacle is not None:
        raise ValueError(
            f"variant='full' needs a unique path from output to input, but {plan.obstacle}; "
            "use variant='local' (or 'auto'), or wrap a chain inside the model"
        )
    if variant == "auto":
        variant = "full" if plan.obstacle is None else "local"
    if variant == "full" and memory == "deferred":
        raise ValueError("memory='deferred' needs variant='local': a full reverse can use 'store' or 'recompute'")
    return variant


def _count(layers: object, n: int) -> int:
    if layers is None:
        return n
    if not isinstance(layers, int) or isinstance(layers, bool):
        raise TypeError(f"layers must be None or a whole number from 1 to {n}, got {layers!r}")
    if not 1 <= layers <= n:
        raise ValueError(f"layers must be from 1 to {n}, the number of layers that run backwards, got {layers}")
    return layers


def _kernel(model: nn.Module, engine: Engine, backend: str | None) -> str:
    """Names of the backends that serve this model's layers as they are now."""
    weight = engine.plan.layers[0].op.weight
    queries = [rk.Query(layer, weight.device.type, weight.dtype) for layer in engine.layers()]
    return ", ".join(dict.fromkeys(choose(query, backend).name for query in queries))


def _engine(model: nn.Module) -> Engine:
    engine = model.__dict__.get(_KEY)
    if engine is None:
        raise RuntimeError("this is a part of a wrapped model, and not wrapped itself; call racecar.wrap on it")
    return engine


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


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
