"""The reverse pass as a Lightning callback: no change to the LightningModule.

from racecar.integrations.lightning import ReversePass

trainer = L.Trainer(callbacks=[ReversePass("features", lam=1e-5)])
trainer.fit(module, train)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "lightning":
        raise
    try:  # the same under its older name
        from pytorch_lightning import Callback
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "racecar.integrations.lightning needs Lightning: pip install lightning", name="lightning"
        ) from error

from ..schedules import LamSchedule, constant
from ..weights import Lam
from ..wrapping import engine_of, wrap


class ReversePass(Callback):
    """Wraps a part of the LightningModule while it is fitted, adds its reverse loss to the loss, and logs it.

    Logged are `reverse` (Σ λ_m · loss_m) and `reverse/NAME` of every layer (without λ). After the fit the part is plain
    again. λ follows the number of optimiser steps, so that a fit from a checkpoint goes on with the right one.

    Args:
        part: name of the part, as in `module.get_submodule(part)`: what `racecar.wrap` takes.
        lam: λ, as in `racecar.wrap`.
        schedule: step -> factor of λ, for example `racecar.schedules.warmup(500)`.
        log: whether to log the reverse loss.
        options: further arguments of `racecar.wrap`.

    Raises:
        ValueError: (when the fit begins) the module has no such part, or it is wrapped already; what `wrap` raises.
        TypeError: (at a step) `training_step` returns neither a loss nor a dictionary with one, as with manual
            optimisation, where `module.get_submodule(part).reverse_loss` is to be added by hand.
    """

    def __init__(
        self,
        part: str,
        lam: Lam,
        *,
        schedule: Callable[[int], float] | None = None,
        log: bool = True,
        **options: Any,
    ) -> None:
        self.part, self.lam, self.options = part, lam, options
        self.schedule, self.log = schedule or constant(), log
        self.net: Any = None
        self.lam_schedule: LamSchedule | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wraps the part, before optimisers and strategies look at the module."""
        if stage != "fit":
            return
        try:
            found: nn.Module = pl_module.get_submodule(self.part)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"{type(pl_module).__name__} has no part {self.part!r} ({error}); it consists of {names}"
            ) from None
        if engine_of(found) is not None:
            raise ValueError(f"{self.part!r} is wrapped already; call unwrap() on it, and leave that to the callback")
        self.net = wrap(found, self.lam, **self.options)
        self.lam_schedule = LamSchedule(self.net, self.schedule)
        own = pl_module.training_step

        @wraps(own)  # Lightning looks at its parameters
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._with_reverse(own(*args, **kwargs))

        pl_module.training_step = training_step

    def _with_reverse(self, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + self.net.reverse_loss
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": output["loss"] + self.net.reverse_loss}
        raise TypeError(
            "training_step must return the loss, or a dictionary with 'loss', for the reverse loss to be added to it, "
            f"got {type(output).__name__}; with manual optimisation add get_submodule({self.part!r}).reverse_loss there"
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """λ of this step."""
        if self.lam_schedule is not None:
            self.lam_schedule.set(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Here and not in the step: with memory="deferred" the losses are known after the backward pass."""
        if self.log and self.net.reverse_losses:
            layers = {f"reverse/{name}": loss for name, loss in self.net.reverse_losses.items()}
            pl_module.log_dict({"reverse": self.net.reverse_loss.detach(), **layers}, batch_size=1)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The module as it was."""
        if stage == "fit":
            self._take_off(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The module as it was, for a fit that ends early."""
        self._take_off(pl_module)

    def _take_off(self, pl_module: Any) -> None:
        if self.net is not None:
            del pl_module.training_step  # the class has its own
            self.net.unwrap()
            self.net = self.lam_schedule = None
