"""A model whose chain of layers is one `nn.Sequential` in it, `features` for example: that part does the work.

Its forward and reverse run as one autograd node where those of a whole chain would; the model around it only passes on
what the user asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

import racecar_kernels as rk
from racecar_kernels import describe

from .engine import Engine, Operands, Settings
from .plan import Plan, is_chain, plan_chain
from .run import Result, Run


def chain_inside(model: nn.Module, plan: Plan) -> tuple[str, nn.Sequential] | None:
    """Path and module of the chain that holds just the layers of a full plan; None where there is none."""
    for path, module in model.named_modules():
        if not path or not isinstance(module, nn.Sequential) or not is_chain(module):
            continue
        try:
            own = plan_chain(module)
        except ValueError:
            continue
        same = own.obstacle is None and [f"{path}.{name}" for name in own.names] == plan.names
        if same and path in plan.whole and _latents(own) == [_kinds(layer.latent) for layer in plan.layers[1:]]:
            last = list(own.order[own.layers[-1].d + len(own.layers[-1].pre) + 1 : own.layers[-1].y + 1])
            if len(_kinds(last)) == getattr(plan.layers[-1], "ahead", 0) == len(last):
                return path, module
    return None


def _latents(plan: Plan) -> list[list[type[nn.Module]]]:
    return [_kinds(layer.latent) for layer in plan.layers[1:]]


def _kinds(modules: Iterable[nn.Module]) -> list[type[nn.Module]]:
    return [type(m) for m in modules if not describe.is_a(m, (nn.Identity, *describe.DROPOUTS))]


class PartEngine(Engine):
    """Passes everything on to the engine of a part of the model."""

    def __init__(self, model: nn.Module, plan: Plan, settings: Settings, part: nn.Module, inner: Engine):
        self.part, self.inner = part, inner
        super().__init__(model, plan, settings)

    @property
    def result(self) -> Result | None:  # type: ignore[override]
        """Of the part's last forward."""
        return self.inner.result

    def set_result(self, value: Result | None) -> None:
        self.inner.set_result(value)

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def set_lam(self, lam: list[float]) -> None:
        self.lam, self.positive = lam, any(lam)
        self.inner.set_lam(lam)

    def attach(self) -> None:
        """Nothing to do: the part has its own hooks."""

    def detach(self, model: nn.Module) -> None:
        self.part.unwrap()  # type: ignore[operator]

    def forward(self, model: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._in_mode(True, own, args, kwargs)

    def without_reverse(
        self, model: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.idle(model)
        return self._in_mode(False, own, args, kwargs)

    def _in_mode(self, training: bool, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The part, which may be in another mode, does as the model around it does."""
        self.inner.training = training
        try:
            return own(*args, **kwargs)
        finally:
            self.inner.training = None

    @contextmanager
    def recording(self, *, reconstruct: bool = False) -> Iterator[Run]:
        with self.inner.recording(reconstruct=reconstruct) as run:
            yield run

    def watching(self, run: Run) -> AbstractContextManager[None]:
        return self.inner.watching(run)

    def reconstruct(self, run: Run) -> Tensor:
        return self.inner.reconstruct(run)

    def reverse_of(self, m: int, y: Tensor, run: Run) -> Tensor:
        return self.inner.reverse_of(m, y, run)

    def layers(self, run: Run | None = None) -> list[rk.Layer]:
        return self.inner.layers(run)

    def operands(self, m: int, run: Run) -> Operands:
        return self.inner.operands(m, run)

    def why_layer_by_layer(self, model: nn.Module) -> str | None:
        return self.inner.why_layer_by_layer(self.part)
