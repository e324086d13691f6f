"""Who is measured against whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import racecar
import racecar_kernels as rk
from racecar_kernels.backends import ON_REQUEST

from . import checkpointed, plain
from .residual import parts_of

LAM = 1e-5
STD = "Std"
VARIANTS = ("full", "local")
POLICIES = [("full", "store"), ("full", "recompute"), ("local", "store"), ("local", "recompute"), ("local", "deferred")]

Forward = Callable[[], Tensor]
Prepare = Callable[[nn.Module, Tensor, float], Forward]


class CannotRunError(RuntimeError):
    """A contestant that this machine or this network does not allow; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One way to train a network.

    Attributes:
        name: as in tables and JSON.
        variant: `full` or `local`; None for plain training.
        prepare: (network, input, λ) -> one forward pass that returns the loss. The network is the contestant's own.
        compiled: whether `torch.compile` works on it first, which takes minutes.
        double: whether it computes in float64; if not, its gradients are judged in float32 alone.
    """

    name: str
    variant: str | None
    prepare: Prepare
    compiled: bool = False
    double: bool = True


def task_loss(y: Tensor) -> Tensor:
    """Stands for any task: cheap, and its gradient reaches every output."""
    return y.square().mean()


def _std(net: nn.Module, x: Tensor, lam: float) -> Forward:
    return lambda: task_loss(net(x))


def _plain(variant: str, run: plain.Losses = plain.forward_and_losses) -> Prepare:
    def prepare(net: nn.Module, x: Tensor, lam: float) -> Forward:
        model, parts = plain.reversed_parts(net, variant, run)

        def forward() -> Tensor:
            loss = task_loss(model(x))
            return loss + lam * torch.stack([one for part in parts for one in part.take()]).sum()

        return forward

    return prepare


def _compiled(variant: str) -> Prepare:
    eager = _plain(variant)

    def prepare(net: nn.Module, x: Tensor, lam: float) -> Forward:
        # dropout draws what it draws without compilation, so that gradients can be compared
        random = any(isinstance(module, nn.Dropout) for module in net.modules())
        options: dict[str, str | int | bool | Callable[..., object]] = {"fallback_random": True} if random else {}
        forward: Forward = torch.compile(eager(net, x, lam), fullgraph=True, dynamic=False, options=options)
        return _explaining(forward)

    return prepare


def _explaining(forward: Forward) -> Forward:
    """Turns what PyTorch's compiler refuses, or a missing C++ compiler, into one sentence."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    def run() -> Tensor:
        try:
            return forward()
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CannotRunError(f"torch.compile: {first}") from error

    return run


def _ours(variant: str, memory: str, backend: str | None) -> Prepare:
    def prepare(net: nn.Module, x: Tensor, lam: float) -> Forward:
        parts = []
        for part in parts_of(net):
            try:
                wrapped = racecar.wrap(
                    net.get_submodule(part.path),
                    lam=lam,
                    variant=variant,
                    memory=memory,
                    input_activation=part.input_activation,
                    backend=backend,
                )
            except ValueError as refused:
                if backend is None:
                    raise
                raise CannotRunError(str(refused)) from refused
            parts.append(wrapped)

        def forward() -> Tensor:
            loss = task_loss(net(x))
            if len(parts) == 1:
                return loss + parts[0].reverse_loss
            return loss + torch.stack([part.reverse_loss for part in parts]).sum()

        return forward

    return prepare


def _of_ours(backend: str | None) -> list[Contestant]:
    ending = "" if backend is None else f", {backend}"
    double = backend not in SINGLE
    return [
        Contestant(f"ours, {variant}, {memory}{ending}", variant, _ours(variant, memory, backend), double=double)
        for variant, memory in POLICIES
    ]


NAMES = (*rk.backends(), *(backend.name for backend in ON_REQUEST))
SINGLE = tuple(
    name for name in NAMES if name not in ("cpp", "reference")
)  # backends of GPU kernels, which leave float64 to others
REFERENCES = [Contestant(f"plain PyTorch, {variant}", variant, _plain(variant)) for variant in VARIANTS]
CHECKPOINTED = [
    Contestant(f"plain PyTorch, {variant}, checkpoints", variant, _plain(variant, checkpointed.forward_and_losses))
    for variant in VARIANTS
]
COMPILED = [Contestant(f"plain PyTorch, {v}, torch.compile", v, _compiled(v), compiled=True) for v in VARIANTS]
CONTESTANTS = [Contestant(STD, None, _std), *REFERENCES, *CHECKPOINTED, *_of_ours(None)]


def contestants(
    *, compiled: bool = False, backends: Sequence[str] = (), containing: str | None = None
) -> list[Contestant]:
    """Plain training, the plain reverse passes and ours under every memory policy.

    Args:
        compiled: with `torch.compile` of the plain reverse passes.
        backends: ours once more with each of these forced, besides the one that is chosen by itself.
        containing: only those whose name contains this text, and plain training.

    Raises:
        ValueError: no backend, or no contestant, has that name.
    """
    for name in backends:
        if name not in NAMES:
            raise ValueError(f"no backend is named {name}; there are {', '.join(NAMES)}")
    everybody = [CONTESTANTS[0], *REFERENCES, *CHECKPOINTED, *(COMPILED if compiled else ()), *CONTESTANTS[5:]]
    everybody += [contestant for name in backends for contestant in _of_ours(name)]
    found = [c for c in everybody if c.name == STD or containing is None or containing in c.name]
    if containing is not None and containing != STD and len(found) == 1:
        raise ValueError(
            f"no contestant's name contains {containing!r}; there are {'; '.join(c.name for c in everybody)}"
        )
    return found
